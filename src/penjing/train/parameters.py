"""Which parameters train, in which modes, and their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from penjing.core.errors import Refused
from penjing.train.optimizers import optimizer_of
from penjing.train.strategy import Strategy


@contextmanager
def training_mode(model: Any, covers: Callable[[str], bool], alone: bool = False) -> Iterator[list[Any]]:
    """Set the model up for training, yield the parameters that train, and put every mode and flag back.

    Parameters with `requires_grad=False` and layers that `covers` leaves out stay as they are; a
    normalization whose own parameters are all frozen keeps its statistics too. With `alone` (steps of one
    example) every BatchNorm keeps its statistics, since one example has none.

    Raises:
        Refused: nothing is left to train.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for name, p in model.named_parameters() if p.requires_grad and not covers(_layer(name))]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise Refused(
                "at least one parameter can train", value="all are frozen", place="model.parameters()",
                fix="set requires_grad on some, or leave the training step out",
            )  # fmt: skip
        model.train()
        for name, module in model.named_modules():
            if is_batchnorm(module) and (alone or _keeps_statistics(module, covers(name))):
                module.eval()
        yield trainable
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def is_batchnorm(module: Any) -> bool:
    """Tell whether a module normalizes by statistics of the batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm)


def _keeps_statistics(module: Any, covered: bool) -> bool:
    own = list(module.parameters(recurse=False))
    return not covered or (bool(own) and not any(p.requires_grad for p in own))


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def make_optimizer(parameters: list[Any], strategy: Strategy) -> Any:
    """Return the strategy's optimizer; weight decay only on tensors with two or more axes.

    Decay on normalization scales and biases hurts (He et al., Bag of Tricks, CVPR 2019).
    """
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": strategy.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return optimizer_of(strategy.optimizer, groups, strategy.rate)
