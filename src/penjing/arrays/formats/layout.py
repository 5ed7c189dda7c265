"""Which values share a scale: tensors as rows, one row for each scale, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, device

from penjing.core.number_format import NumberFormat

Array = Any


def to_rows(x: Array, format: NumberFormat, fill: float = 0) -> Array:
    """Return a tensor as `[scales, values]`: every row shares a scale, in the order of the scales.

    Args:
        x: any shape that the format takes (`NumberFormat.scale_shape`), any type.
        fill: put behind the values of a last group that is shorter.

    Raises:
        Refused: the shape does not fit the granularity.
    """
    xp = array_namespace(x)
    scales = math.prod(format.scale_shape(x.shape))
    if format.granularity != "group":
        return xp.reshape(x, (scales, -1))
    flat = xp.reshape(x, (x.shape[0], -1))
    missing = -flat.shape[1] % format.group
    if missing:
        tail = xp.full((x.shape[0], missing), fill, dtype=x.dtype, device=device(x))
        flat = xp.concat([flat, tail], axis=1)
    return xp.reshape(flat, (scales, format.group))


def from_rows(rows: Array, format: NumberFormat, shape: Sequence[int]) -> Array:
    """Undo `to_rows` for a tensor of this shape."""
    xp = array_namespace(rows)
    if format.granularity != "group":
        return xp.reshape(rows, tuple(shape))
    groups = format.scale_shape(shape)[1]
    flat = xp.reshape(rows, (shape[0], groups * format.group))
    return xp.reshape(flat[:, : math.prod(shape[1:])], tuple(shape))


def row_lengths(x: Array, format: NumberFormat) -> Array:
    """Return how many values of x share each scale, float32 `[scales, 1]`: less in a shorter last group."""
    xp = array_namespace(x)
    shape = format.scale_shape(x.shape)
    scales = math.prod(shape)
    if format.granularity != "group":
        return xp.full((scales, 1), math.prod(x.shape) // scales, dtype=xp.float32, device=device(x))
    columns = math.prod(x.shape[1:])
    lengths = [min(format.group, columns - start) for start in range(0, columns, format.group)]
    one_row = xp.asarray(lengths, dtype=xp.float32, device=device(x))
    return xp.reshape(xp.tile(one_row, (x.shape[0],)), (scales, 1))
