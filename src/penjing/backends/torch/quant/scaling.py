"""Inputs of linear layers that can be scaled for nothing: the layer before them takes the inverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penjing.backends.torch.hooks import hooked
from penjing.backends.torch.tensors import evaluating, select_output

TOLERANCE = 1e-3
"""Largest difference of the outputs in a trial, relative to their largest magnitude."""


@dataclass(frozen=True)
class Feed:
    """Linear layers that take one tensor, and what makes it.

    Attributes:
        producer: a normalization, or a linear layer, perhaps with a positively homogeneous function or a
            product behind it; "" where nothing can take the inverse of a scale.
        consumers: names of the layers, first to last.
    """

    producer: str
    consumers: tuple[str, ...]


def find_feeds(
    model: nn.Module,
    layers: Sequence[str],
    inputs: tuple[Tensor, ...],
    seed: int,
    covers: Callable[[str], bool],
) -> list[Feed]:
    """Return which linear layers share their input, and what that can be scaled by.

    Found by trial: a candidate's outputs are divided by random factors and the layers' weights multiplied by
    them; the model has to compute the same. The weights are put back.

    Args:
        model: a float model in any mode.
        layers: names of linear layers whose weights are nobody else's.
        inputs: of one pass, few examples.
        seed: of the factors.
        covers: tells which layers may take the inverse.
    """
    watched = _watch(model, inputs)
    before = _output(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    shared: dict[int, list[str]] = {}
    for name, (given, _) in watched.items():
        if name in layers:
            shared.setdefault(id(given), []).append(name)
    found = []
    for consumers in shared.values():
        width = model.get_submodule(consumers[0]).in_features
        factors = torch.rand(width, generator=generator) * 1.5 + 0.5
        producer = next(
            (
                name
                for name in _candidates(model, watched, consumers)
                if covers(name) and _same(model, Feed(name, tuple(consumers)), factors, inputs, before)
            ),
            "",
        )
        found.append(Feed(producer, tuple(consumers)))
    return found


def scale_inputs(model: nn.Module, feed: Feed, factors: Tensor) -> None:
    """Multiply weights by factors of their inputs `[in]`, in place, and divide what makes these."""
    with torch.no_grad():
        producer = model.get_submodule(feed.producer)
        for tensor in producer.parameters(recurse=False):
            tensor.div_(factors.to(tensor).reshape(-1, *[1] * (tensor.ndim - 1)))
        for name in feed.consumers:
            weight = model.get_submodule(name).weight
            weight.mul_(factors.to(weight))


def _watch(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return input and output of modules called once with a tensor, in the order in which they end."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def watch(name: str, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], torch.Tensor) and isinstance(output, torch.Tensor):
            seen.setdefault(name, []).append((given[0], output))

    with hooked(dict(model.named_modules()), after=watch):
        _output(model, inputs)
    return {name: calls[0] for name, calls in seen.items() if len(calls) == 1}


def _candidates(
    model: nn.Module, watched: dict[str, tuple[Tensor, Tensor]], consumers: Sequence[str]
) -> Iterator[str]:
    """Yield what may make the input of layers: what returned it, then linear layers before, nearest first."""
    given, width = watched[consumers[0]][0], model.get_submodule(consumers[0]).in_features
    names = list(watched)
    earlier = names[: min(names.index(name) for name in consumers)][::-1]
    fits = [name for name in earlier if _can_divide(model.get_submodule(name), width)]
    direct = [name for name in fits if watched[name][1] is given]
    parent = consumers[0].rpartition(".")[0]
    near = [name for name in fits if name.rpartition(".")[0] == parent and name not in direct]
    yield from (*direct, *(name for name in near if isinstance(model.get_submodule(name), nn.Linear)))


def _can_divide(module: nn.Module, width: int) -> bool:
    own = list(module.parameters(recurse=False))
    whole = all(len(tensor) == width for tensor in own if tensor.ndim)
    linear = isinstance(module, nn.Linear)
    return bool(own) and whole and (linear or all(tensor.ndim == 1 for tensor in own))


def _same(model: nn.Module, feed: Feed, factors: Tensor, inputs: tuple[Tensor, ...], before: Tensor) -> bool:
    modules = [model.get_submodule(name) for name in (feed.producer, *feed.consumers)]
    tensors = [tensor for module in modules for tensor in module.parameters(recurse=False)]
    old = [tensor.detach().clone() for tensor in tensors]
    scale_inputs(model, feed, factors)
    gap = float((_output(model, inputs) - before).abs().max())
    with torch.no_grad():
        for tensor, value in zip(tensors, old, strict=True):
            tensor.copy_(value)
    return gap <= TOLERANCE * float(before.abs().max().clamp(min=1e-30))


def _output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with evaluating(model), torch.no_grad():
        return select_output(model(*inputs)).double()
