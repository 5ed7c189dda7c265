"""What a cut leaves of tensors, parameters and multiply-adds, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores.units import STATISTICS
from penjing.core.backend import Group

Kept = Mapping[str, NDArray[np.int64]]
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes by layer and tensor name."""


def shares_left(groups: Iterable[Group], kept: Kept) -> dict[tuple[str, str], float]:
    """Return the share of every tensor's elements that a cut leaves, by layer and tensor name.

    Args:
        groups: every tensor that they see is in the result.
        kept: by group name, the units that stay; groups that are not named stay whole.
    """
    stays: dict[tuple[str, str], dict[tuple[int, int], NDArray[np.bool_]]] = {}
    for group in groups:
        alive = np.ones(group.size + 1, bool)
        if group.name in kept:
            alive[:-1] = False
            alive[kept[group.name]] = True
        for slot in group.slots:
            axes, key = stays.setdefault((slot.layer, slot.tensor), {}), (slot.axis, len(slot.units))
            # Indices of no unit have the number -1, which is the last entry.
            axes[key] = axes.get(key, np.ones(len(slot.units), bool)) & alive[slot.units]
    return {tensor: math.prod(float(m.mean()) for m in axes.values()) for tensor, axes in stays.items()}


def parameters_removed(shares: Mapping[tuple[str, str], float], shapes: Shapes) -> float:
    """Return how many parameters go when these shares of tensors stay; tied ones count for each name."""
    return sum(
        (1 - share) * math.prod(shapes[layer][tensor])
        for (layer, tensor), share in shares.items()
        if tensor not in STATISTICS
    )


def multiply_adds_removed(
    shares: Mapping[tuple[str, str], float], shapes: Shapes, by_layer: Mapping[str, int]
) -> float:
    """Return how many multiply-adds go: of each layer the share of its largest tensor that goes.

    Exact for convolutions and linear layers, whose every weight is used equally often. Products of
    activations (attention) are not counted.
    """
    removed = 0.0
    for layer, count in by_layer.items():
        tensors = [name for owner, name in shares if owner == layer]
        if tensors:
            largest = max(tensors, key=lambda name: math.prod(shapes[layer][name]))
            removed += count * (1 - shares[layer, largest])
    return removed


def unit_costs(
    groups: Iterable[Group], removed: Callable[[Mapping[tuple[str, str], float]], float]
) -> dict[str, float]:
    """Return what one unit of each group costs, by group name.

    Args:
        groups: each is taken by itself, the others whole.
        removed: what goes when shares of tensors stay, such as `parameters_removed` with its shapes.
    """
    costs = {}
    for group in groups:
        each = len(np.unique(group.blocks))
        first = np.unique(group.blocks, return_index=True)[1]
        rest = np.setdiff1d(np.arange(group.size), first)
        costs[group.name] = removed(shares_left([group], {group.name: rest})) / each
    return costs
