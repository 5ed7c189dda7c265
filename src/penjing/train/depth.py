"""What happens to the blocks of a network while it trains: left out by chance, or computed twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penjing.core.backend import Arrays
from penjing.core.errors import Refused
from penjing.train.parameters import keep_statistics
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def wrap_blocks(model: nn.Module, example: Arrays, strategy: Strategy) -> Iterator[None]:
    """Wrap residual blocks as a strategy says while the context lasts; nothing where it says nothing.

    `stochastic_depth` leaves a block out for a whole batch, the last with that probability and the others
    with less, in proportion to their place (Huang et al. 2016, "Deep networks with stochastic depth"); what a
    block that stays adds to its input is divided by its probability, so that evaluation needs no change.
    `recompute` keeps only the input of each block and computes the block again for its gradients (Chen et
    al. 2016, "Training deep nets with sublinear memory cost"), with the same random numbers; BatchNorm's
    statistics count once.

    Args:
        model: a torch module; its blocks are found by running it on the example.
        example: inputs `[1, ...]`.
        strategy: says which of the two.

    Raises:
        Refused: there is no block, or one returns more than a tensor where blocks are to be left out.
    """
    if not (strategy.recompute or strategy.stochastic_depth):
        yield
        return
    from penjing.backends.torch.structure.blocks import find_blocks

    found = find_blocks(model, example).found
    if not found:
        raise Refused(
            "stochastic_depth and recompute need residual blocks",
            value="none in the model",
            place="strategy",
            fix="leave both out",
        )
    blocks = []
    try:
        for place, (name, stand_in) in enumerate(found.items(), 1):
            block = model.get_submodule(name)
            share = strategy.stochastic_depth * place / len(found)
            block.forward = _WrappedBlock(block, block.forward, stand_in, share, strategy.recompute)
            blocks.append(block)
        yield
    finally:
        for block in blocks:
            del block.forward


@dataclass(frozen=True)
class _WrappedBlock:
    """A block's forward: left out by chance, or computed again for its gradients."""

    block: nn.Module
    forward: Callable[..., Any]
    around: Callable[..., Any]
    dropped: float
    recompute: bool

    def __call__(self, *given: Any, **named: Any) -> Any:
        import torch

        if not self.block.training:
            return self.forward(*given, **named)
        if self.dropped and float(torch.rand(())) < self.dropped:
            return self.around(*given, **named)
        made = self._computed(given, named)
        if not self.dropped:
            return made
        if not isinstance(made, torch.Tensor):
            raise Refused(
                "needs blocks that return one tensor",
                value=type(made).__name__,
                place="stochastic_depth",
                fix="leave it out",
            )
        passed = self.around(*given, **named)
        return passed + (made - passed) / (1.0 - self.dropped)

    def _computed(self, given: Any, named: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        if not self.recompute:
            return self.forward(*given, **named)

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), keep_statistics(self.block)

        return checkpoint(self.forward, *given, use_reentrant=False, context_fn=contexts, **named)
