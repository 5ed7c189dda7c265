"""How much each unit of a group matters, and which units stay: pure functions on arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import Group, Slot

Floats = NDArray[np.float64]
Tensors = Mapping[str, Mapping[str, NDArray[np.floating]]]
"""Arrays by layer and tensor name."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def sum_by_unit(values: NDArray[np.floating], slot: Slot, size: int) -> Floats:
    """Sum an array over everything but the units that a slot sees.

    Args:
        values: the slot's tensor, or anything of its shape.
        slot: its `units` is as long as the axis, or, for the input of a grouped convolution
            (`[out, in / blocks, *kernel]`), as all input channels together.
        size: units of the group.

    Returns:
        One sum for each unit, shape `[size]`.
    """
    values = np.asarray(values, np.float64)
    length, count = values.shape[slot.axis], len(slot.units)
    if count == length:
        sums = values.sum(axis=tuple(a for a in range(values.ndim) if a != slot.axis))
    else:
        blocks = count // length
        split = values.reshape(blocks, values.shape[0] // blocks, length, -1)
        sums = split.sum(axis=(1, 3)).reshape(-1)
    seen = slot.units >= 0
    return np.bincount(slot.units[seen], weights=sums[seen], minlength=size).astype(np.float64)


def l2_score(group: Group, tensors: Tensors) -> Floats:
    """Return the Euclidean norm of all parameters of each unit, over every member of the group.

    (Li et al. 2017 for one filter; summed over coupled layers as in Fang et al. 2023, DepGraph.)

    Returns:
        Shape `[group.size]`, at least 0.
    """
    total = _over_slots(group, lambda slot: np.square(np.asarray(tensors[slot.layer][slot.tensor], float)))
    return np.sqrt(total)


def taylor_score(
    groups: Iterable[Group], tensors: Tensors, gradients: Iterable[Tensors]
) -> dict[str, Floats]:
    """Return for each group the mean over batches of the squared sum of weight times gradient of each unit.

    The first-order estimate of how the loss changes without the unit (Molchanov et al. 2019, eq. 8), summed
    over coupled members before squaring (group Fisher, Liu et al. 2021).

    Args:
        groups: the units.
        tensors: weights by layer and name.
        gradients: for each batch, gradients of the mean loss by layer and name; walked once.

    Returns:
        By group name, shape `[group.size]`, at least 0; zeros where there was no batch.
    """
    groups, batches = tuple(groups), 0
    total = {group.name: np.zeros(group.size) for group in groups}
    for gradient in gradients:
        batches += 1
        for group in groups:
            total[group.name] += np.square(first_order(group, tensors, gradient))
    return {name: score / max(batches, 1) for name, score in total.items()}


def first_order(group: Group, tensors: Tensors, gradient: Tensors) -> Floats:
    """Return for each unit the sum of weight times gradient over all members, shape `[group.size]`."""

    def product(slot: Slot) -> NDArray[np.floating]:
        weight = np.asarray(tensors[slot.layer][slot.tensor], np.float64)
        return weight * gradient.get(slot.layer, {}).get(slot.tensor, np.zeros(1))

    return _over_slots(group, product)


def _over_slots(group: Group, values: Callable[[Slot], NDArray[np.floating]]) -> Floats:
    total: Floats = np.zeros(group.size)
    for s in group.slots:
        if s.tensor not in _STATISTICS:
            total += sum_by_unit(values(s), s, group.size)
    return total


def kept_width(size: int, ratio: float, blocks: int, round_to: int) -> int:
    """Return how many units stay when a share `ratio` is removed.

    The nearest multiple of `round_to` that all blocks can share equally, at least one such multiple, and
    all units where the group is no wider than that.

    >>> kept_width(64, 0.5, 1, 8), kept_width(64, 0.999, 1, 8), kept_width(6, 0.5, 1, 8)
    (32, 8, 6)
    >>> kept_width(12, 0.5, 4, 1)
    8
    """
    step = math.lcm(round_to, blocks)
    nearest = math.floor(size * (1 - ratio) / step + 0.5) * step
    return min(max(nearest, step), size)


def select(score: Floats, ratio: float, blocks: NDArray[np.int64], round_to: int) -> NDArray[np.int64]:
    """Return the units that stay, sorted: those of highest score, equally many from every block.

    Args:
        score: shape `[size]`; ties go to the lower index.
        ratio: share removed, in (0, 1).
        blocks: shape `[size]`, the block of every unit.
        round_to: the number that stays is a multiple of this where the group is wide enough.
    """
    names = np.unique(blocks)
    each = kept_width(len(score), ratio, len(names), round_to) // len(names)
    best = np.argsort(-np.asarray(score, np.float64), kind="stable")
    kept = [best[blocks[best] == name][:each] for name in names]
    return np.sort(np.concatenate(kept)).astype(np.int64)
