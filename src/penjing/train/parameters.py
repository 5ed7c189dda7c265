"""Which parameters train, in which modes, at which rates, and their optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from penjing.core.errors import Refused
from penjing.train.optimizers import ADAM_SHARE, OPTIMIZERS, build_optimizer
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class BatchNormMode:
    """How BatchNorm trains.

    Attributes:
        single_example: batches of one example, which has no statistics: every BatchNorm keeps its own.
        frozen: statistics and scales stay.
        ghost: examples that are normalized together; None: the batch.
    """

    single_example: bool = False
    frozen: bool = False
    ghost: int | None = None


@contextmanager
def set_training_mode(
    model: nn.Module, covers: Callable[[str], bool], norms: BatchNormMode = BatchNormMode()
) -> Iterator[list[nn.Parameter]]:
    """Set the model up for training, yield the parameters that train, and put every mode and flag back.

    Parameters with `requires_grad=False` and layers that `covers` leaves out stay as they are; a
    normalization whose own parameters are all frozen keeps its statistics too.

    Raises:
        Refused: nothing is left to train.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).eval()
    >>> with set_training_mode(model, covers=lambda layer: layer == "1") as parameters:
    ...     [tuple(p.shape) for p in parameters], model.training
    ([(1, 2), (1,)], True)
    >>> model.training
    False
    """
    modes = [(module, module.training) for module in model.modules()]
    fixed = {name for name, module in model.named_modules() if norms.frozen and is_batchnorm(module)}

    def trains(layer: str) -> bool:
        return covers(layer) and layer not in fixed

    frozen = [p for name, p in model.named_parameters() if p.requires_grad and not trains(_layer(name))]
    ghosts: list[nn.Module] = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise Refused(
                "needs at least one parameter that requires gradients",
                value="none",
                place="model.parameters()",
                fix="set requires_grad on some, or leave the training step out",
            )
        model.train()
        for name, module in model.named_modules():
            if not is_batchnorm(module):
                continue
            if norms.single_example or keeps_statistics(module, trains(name)):
                module.eval()
            elif norms.ghost is not None:
                module.forward = partial(_by_ghosts, norms.ghost, module.forward)
                ghosts.append(module)
        yield trainable
    finally:
        for module in ghosts:
            del module.forward
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def _by_ghosts(size: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Normalize parts of a batch separately (Hoffer et al. 2017, "Train longer, generalize better")."""
    import torch

    return torch.cat([forward(part) for part in x.tensor_split(max(1, len(x) // size))])


def is_batchnorm(module: nn.Module) -> bool:
    """Tell whether a module normalizes by statistics of the batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm)


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalize as it did, but leave the running statistics as they are."""
    layers: list[Any] = [module for module in model.modules() if is_batchnorm(module) and module.training]
    momenta = [module.momentum for module in layers]
    try:
        for module in layers:
            module.momentum = 0.0
        yield
    finally:
        for module, momentum in zip(layers, momenta, strict=True):
            module.momentum = momentum


def keeps_statistics(module: nn.Module, covered: bool) -> bool:
    """Tell whether a normalization is left as it is: not covered, or all its own parameters are frozen."""
    own = list(module.parameters(recurse=False))
    return not covered or (bool(own) and not any(p.requires_grad for p in own))


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def make_optimizer(model: nn.Module, parameters: list[nn.Parameter], strategy: Strategy) -> Optimizer:
    """Return the strategy's optimizer on groups of one weight decay and one share of the rate each.

    Weight decay is only on tensors with two or more axes: on normalization scales and biases it hurts (He et
    al., Bag of Tricks, CVPR 2019). With `layer_decay` each block trains at a share of the next one's rate
    (Clark et al. 2020, "ELECTRA"). Muon steps on matrices between the first and the last layer and Adam on
    the rest, embeddings among them, as its authors do.

    Args:
        model: names and order of its parameters count.
        parameters: those that train.
        strategy: what it says of the optimizer, the rate and the decay.

    Raises:
        Refused: `layer_decay` with an optimizer that has one rate for all.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = make_optimizer(model, list(model.parameters()), Strategy(weight_decay=0.1))
    >>> [(tuple(g["params"][0].shape), g["weight_decay"]) for g in optimizer.param_groups]
    [((1, 2), 0.1), ((1,), 0.0)]
    """
    if OPTIMIZERS[strategy.optimizer].one_rate and strategy.layer_decay is not None:
        raise Refused(
            f"cannot be combined with {strategy.optimizer}, which has one rate for all layers",
            value=strategy.layer_decay,
            place="layer_decay",
            fix="leave it out, or take adamw",
        )
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    shares = _shares(list(model.named_parameters()), strategy.layer_decay)
    matrices = _hidden_matrices(model) if OPTIMIZERS[strategy.optimizer].matrices else None

    def kind(parameter: nn.Parameter) -> tuple[float, float, bool]:
        share = shares.get(names.get(id(parameter), ""), 1.0)
        return share, strategy.weight_decay if parameter.ndim > 1 else 0.0, id(parameter) in (matrices or ())

    groups = []
    for (share, decay, matrix), members in itertools.groupby(
        sorted(parameters, key=kind, reverse=True), kind
    ):
        group: dict[str, Any] = {"params": list(members), "weight_decay": decay, "share": share}
        if matrices is not None:
            group["use_muon"] = matrix
            group["share"] = share if matrix else share * ADAM_SHARE
        groups.append(group)
    return build_optimizer(strategy.optimizer, groups, strategy.peak_lr)


def _shares(named: list[tuple[str, nn.Parameter]], decay: float | None) -> dict[str, float]:
    """Return a parameter's share of the rate by its name: blocks are counted in the order of registration."""
    if decay is None:
        return {}
    depths: dict[str, int] = {}
    for name, _ in named:
        depths.setdefault(_block(name), len(depths))
    return {name: decay ** (len(depths) - 1 - depths[_block(name)]) for name, _ in named}


def _block(name: str) -> str:
    """Return a name up to its first number, or up to the layer where it has none."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Return the identities of weights of two or more axes between the first layer and the last.

    An embedding counts as a layer, and the last one may share its weight.
    """
    from torch import nn

    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found = [id(p) for _, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1]
    return set(found) - {*found[:1], *found[-1:], *tables}
