"""Which parameters train, in which modes, at which rates, and their optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from penjing.core.errors import Refused
from penjing.train.optimizers import ADAM_SHARE, KINDS, optimizer_of
from penjing.train.strategy import Strategy


@dataclass(frozen=True)
class BatchNorms:
    """How BatchNorm trains.

    Attributes:
        alone: steps of one example, which has no statistics: every BatchNorm keeps its own.
        frozen: statistics and scales stay.
        ghost: examples that are normalized together; None: the batch.
    """

    alone: bool = False
    frozen: bool = False
    ghost: int | None = None


@contextmanager
def training_mode(
    model: Any, covers: Callable[[str], bool], norms: BatchNorms = BatchNorms()
) -> Iterator[list[Any]]:
    """Set the model up for training, yield the parameters that train, and put every mode and flag back.

    Parameters with `requires_grad=False` and layers that `covers` leaves out stay as they are; a
    normalization whose own parameters are all frozen keeps its statistics too.

    Raises:
        Refused: nothing is left to train.
    """
    modes = [(module, module.training) for module in model.modules()]
    still = {name for name, module in model.named_modules() if norms.frozen and is_batchnorm(module)}

    def trains(layer: str) -> bool:
        return covers(layer) and layer not in still

    frozen = [p for name, p in model.named_parameters() if p.requires_grad and not trains(_layer(name))]
    ghosts: list[Any] = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise Refused(
                "at least one parameter can train",
                value="all are frozen",
                place="model.parameters()",
                fix="set requires_grad on some, or leave the training step out",
            )
        model.train()
        for name, module in model.named_modules():
            if not is_batchnorm(module):
                continue
            if norms.alone or keeps_statistics(module, trains(name)):
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


def _by_ghosts(size: int, forward: Callable[[Any], Any], x: Any) -> Any:
    """Normalize parts of a batch apart (Hoffer et al. 2017, "Train longer, generalize better")."""
    import torch

    return torch.cat([forward(part) for part in x.tensor_split(max(1, len(x) // size))])


def is_batchnorm(module: Any) -> bool:
    """Tell whether a module normalizes by statistics of the batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm)


@contextmanager
def statistics_kept(model: Any) -> Iterator[None]:
    """Let BatchNorm normalize as it did, but leave the running statistics as they are."""
    layers = [module for module in model.modules() if is_batchnorm(module) and module.training]
    momenta = [module.momentum for module in layers]
    try:
        for module in layers:
            module.momentum = 0.0
        yield
    finally:
        for module, momentum in zip(layers, momenta, strict=True):
            module.momentum = momentum


def keeps_statistics(module: Any, covered: bool) -> bool:
    """Tell whether a normalization is left as it is: not covered, or all its own parameters are frozen."""
    own = list(module.parameters(recurse=False))
    return not covered or (bool(own) and not any(p.requires_grad for p in own))


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def make_optimizer(model: Any, parameters: list[Any], strategy: Strategy) -> Any:
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
    """
    if KINDS[strategy.optimizer].one_rate and strategy.layer_decay is not None:
        raise Refused(
            f"{strategy.optimizer} steps at one rate in all layers",
            value=strategy.layer_decay,
            place="layer_decay",
            fix="leave it out, or take adamw",
        )
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    shares = _shares(list(model.named_parameters()), strategy.layer_decay)
    matrices = _hidden_matrices(model) if KINDS[strategy.optimizer].matrices else None

    def kind(parameter: Any) -> tuple[float, float, bool]:
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
    return optimizer_of(strategy.optimizer, groups, strategy.rate)


def _shares(named: list[tuple[str, Any]], decay: float | None) -> dict[str, float]:
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


def _hidden_matrices(model: Any) -> set[int]:
    """Return the identities of weights of two or more axes between the first layer and the last.

    An embedding counts as a layer, and the last one may share its weight.
    """
    from torch import nn

    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found = [id(p) for _, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1]
    return set(found) - {*found[:1], *found[-1:], *tables}
