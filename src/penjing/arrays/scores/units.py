"""From tensors to units: sums and rows of everything that belongs to one unit of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import Group, Slot

Floats = NDArray[np.float64]
Tensors = Mapping[str, Mapping[str, NDArray[np.floating]]]
"""Arrays by layer and tensor name."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Tensors that no training changes; they belong to units, but are no parameters of them."""


def parameters(group: Group) -> Iterator[Slot]:
    """Yield the slots of a group but those of running statistics."""
    return (slot for slot in group.slots if slot.tensor not in STATISTICS)


def consumers(group: Group) -> tuple[Slot, ...]:
    """Return the slots where layers take the group's units as inputs, each layer once."""
    return tuple({slot.layer: slot for slot in parameters(group) if slot.role == "in"}.values())


def sum_by_index(values: NDArray[np.floating], slot: Slot) -> Floats:
    """Sum an array over everything but the axis of a slot.

    Args:
        values: the slot's tensor, or anything of its shape.
        slot: its `units` is as long as the axis, or, for the input of a grouped convolution
            (`[out, in / blocks, *kernel]`), as all input channels together.

    Returns:
        Shape `[len(slot.units)]`.
    """
    values = np.asarray(values, np.float64)
    length, count = values.shape[slot.axis], len(slot.units)
    if count == length:
        return np.asarray(values.sum(axis=tuple(a for a in range(values.ndim) if a != slot.axis)))
    split = values.reshape(count // length, -1, length, int(np.prod(values.shape[2:])))
    return np.asarray(split.sum(axis=(1, 3)).reshape(-1))


def to_units(by_index: Floats, slot: Slot, size: int) -> Floats:
    """Add what the indices of a slot have to their units.

    Args:
        by_index: shape `[..., len(slot.units)]`.
        slot: its indices of no unit are left out.
        size: units of the group.

    Returns:
        Shape `[..., size]`.
    """
    total = np.zeros((*by_index.shape[:-1], size))
    seen = slot.units >= 0
    np.add.at(total.T, slot.units[seen], by_index[..., seen].T)
    return total


def sum_by_unit(values: NDArray[np.floating], slot: Slot, size: int) -> Floats:
    """Sum an array over everything but the units that a slot sees.

    Args:
        values: as in `sum_by_index`.
        slot: as in `sum_by_index`.
        size: units of the group.

    Returns:
        One sum for each unit, shape `[size]`.
    """
    return to_units(sum_by_index(values, slot), slot, size)


def over_parameters(group: Group, values: Callable[[Slot], NDArray[np.floating]]) -> Floats:
    """Sum over all members of a group what `values` gives for each slot; shape `[group.size]`."""
    total: Floats = np.zeros(group.size)
    for slot in parameters(group):
        total += sum_by_unit(values(slot), slot, group.size)
    return total


def rows_by_unit(values: NDArray[np.floating], slot: Slot, size: int) -> Floats:
    """Return the entries of each unit of a tensor as one row.

    Args:
        values: the slot's tensor.
        slot: as in `sum_by_index`.
        size: units of the group.

    Returns:
        Shape `[size, entries]`; rows of units with fewer entries end with zeros.
    """
    values = np.asarray(values, np.float64)
    length, count = values.shape[slot.axis], len(slot.units)
    if count == length:
        rows = np.moveaxis(values, slot.axis, 0).reshape(count, -1)
    else:
        split = values.reshape(count // length, -1, length, int(np.prod(values.shape[2:])))
        rows = split.transpose(0, 2, 1, 3).reshape(count, -1)
    seen = np.flatnonzero(slot.units >= 0)
    units = slot.units[seen]
    most = int(np.bincount(units, minlength=size).max(initial=0))
    result = np.zeros((size, most, rows.shape[1]))
    by_unit = np.argsort(units, kind="stable")
    first = np.searchsorted(units[by_unit], units[by_unit])
    result[units[by_unit], np.arange(len(units)) - first] = rows[seen[by_unit]]
    return result.reshape(size, -1)
