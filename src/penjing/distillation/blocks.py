"""Distillation block by block, without labels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Changes, Outcome
from penjing.core.registry import handles
from penjing.train.hooks import Hooks
from penjing.train.loop import fit
from penjing.train.method import DistillationMethod
from penjing.train.objective import to_tensors
from penjing.train.outcome import note_training
from penjing.train.teacher import freeze_teacher, refuse_several_teachers

if TYPE_CHECKING:
    from torch import nn

    from penjing.backends.torch.distill.local_blocks import LocalBlocks


class DistillBlocks(DistillationMethod):
    """Train each block of the model towards the same block of the original, given the original's input.

    All blocks learn at once and none waits for those before it: one pass of the original gives the inputs
    and the wanted outputs of all. The loss of a block is the squared error over the squares of the wanted
    outputs. Labels are not used; what is in no block stays as it is. After a cut that leaves the blocks'
    inputs and outputs their shapes: heads, neurons, inner channels, single weights (block-local
    distillation: Bercovich et al., "Puzzle", 2024). `stochastic_depth` and `recompute` cannot be used.

    Attributes:
        blocks: names of blocks; empty: found, modules in a row that both networks have.

    >>> DistillBlocks(epochs=2, blocks=("layer1.0",))
    DistillBlocks(epochs=2.0, blocks=('layer1.0',))
    """

    unsupported: ClassVar[Mapping[str, str]] = {
        "stochastic_depth": "where each block learns for itself",
        "recompute": "where each block learns for itself",
    }
    blocks: tuple[str, ...] = ()


@handles(DistillBlocks, "torch")
def distill_blocks(model: nn.Module, method: DistillBlocks, context: Context) -> Outcome:
    """Train the blocks of a torch module; a change for every block.

    Raises:
        Refused: several teachers, a block that is named and does not fit, or what `penjing.train.loop.fit`
            refuses.
    """
    from penjing.backends.torch.distill.local_blocks import LocalBlocks, find_common_blocks

    refuse_several_teachers(context)
    found = find_common_blocks(model, context.original, context.task.valid.example(), method.blocks)
    chosen = [name for name in found.names if _covered(model, name, context)]
    changes = Changes(method)
    if method.blocks and found.reasons:
        name, reason = next(iter(found.reasons.items()))
        raise Refused(
            "must be a block that fits the teacher's",
            value=f"one where {reason}",
            place=f"DistillBlocks.blocks, {name}",
            fix="leave it out, or use Distill",
        )
    if not chosen:
        _skip(changes, found.reasons or {"*": "no modules in a row in both networks"})
        return Outcome(model, changes)
    strategy, start = method.strategy.with_batch_size(context.task), time.perf_counter()
    with freeze_teacher(context, strategy.precision) as teacher:
        local = LocalBlocks({name: model.get_submodule(name) for name in chosen}, teacher, teacher.module)
        size = strategy.batch_size or context.task.batch_size
        before = _errors(local, context, size)
        done = fit(
            local,
            context.task.train,
            lambda outputs, inputs, targets: sum(outputs),
            strategy,
            seed=context.seed,
            covers=lambda layer: context.covers(local.layer(layer)),
            hooks=Hooks(log=lambda line: context.say(line.under("DistillBlocks"))),
        )
        after = _errors(local, context, size)
    note_training(context, "DistillBlocks", time.perf_counter() - start, done)
    for name, a, b in zip(chosen, before, after, strict=True):
        changes.done(name, error_before=round(a, 6), error_after=round(b, 6), steps=done.steps)
    _skip(changes, found.reasons)
    return Outcome(model, changes)


def _skip(changes: Changes, reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        changes.skip(name, reason)


def _covered(model: nn.Module, block: str, context: Context) -> bool:
    names = (name.rpartition(".")[0] for name, _ in model.get_submodule(block).named_parameters())
    return any(context.covers(f"{block}.{name}".rstrip(".")) for name in names)


def _errors(local: LocalBlocks, context: Context, size: int) -> list[float]:
    """Return the mean loss of each block in evaluation mode over at most four batches, always the same."""
    import torch

    modes = [(module, module.training) for module in local.modules()]
    local.eval()
    rows = []
    try:
        with torch.no_grad():
            for inputs, _ in context.task.train.batches(size, context.seed):
                outputs = local(*to_tensors(inputs, next(local.parameters())))
                rows.append([float(loss) for loss in outputs])
                if len(rows) == 4:
                    break
    finally:
        for module, mode in modes:
            module.training = mode
    return [float(value) for value in np.mean(rows, axis=0)]
