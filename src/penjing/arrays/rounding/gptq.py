"""GPTQ: one sweep over the columns; what rounding each cost is made up for by the columns after it."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import rounded
from penjing.arrays.formats.parameters import Parameters
from penjing.arrays.rounding.inverse_factor import InverseFactor, Order
from penjing.core.number_format import NumberFormat

Array = Any

COLUMNS = 128
"""Columns after which corrections are carried to all that follow (the paper's block)."""


def sweep(
    weight: Array, factor: InverseFactor, format: NumberFormat, parameters: Parameters, order: Order
) -> tuple[Array, Parameters]:
    """Round rows of a matrix to a format so that its outputs change little.

    Column by column: the column is rounded to the nearest values, and the columns that are left take what
    undoes most of the change of the outputs. Frantar et al. 2023, "GPTQ: Accurate post-training quantization
    for generative pre-trained transformers", algorithm 1. Rows do not depend on each other, so that some can
    be taken at a time, with their parameters.

    Args:
        weight: `[rows, columns]` in double precision.
        factor: of the damped mean of x xᵀ, taken in the same order (`factorized`).
        format: with a scale for each row, or for each group of columns of a row.
        parameters: of the weight in this format.
        order: `activation`, columns of large inputs first, under the given scales of the groups that they
            are in; `given`, the columns as they are, the scales of a group taken by clip search when the
            sweep comes to it, on weights that already make up for what went before.

    Returns:
        The new weight, float32, on values of the format, and the parameters that it has.
    """
    xp = array_namespace(weight)
    columns, taken, upper = weight.shape[1], factor.taken, factor.upper
    new, found = weight[:, taken], xp.zeros(weight.shape, dtype=xp.float32)
    group = format.group or columns
    fresh = order == "given" and bool(format.group) and parameters.tensor_scale is None
    width = max(COLUMNS // group, 1) * group if fresh else COLUMNS
    groups = [int(column) // group for column in taken]
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        errors = xp.zeros((weight.shape[0], stop - start), dtype=new.dtype)
        for column in range(start, stop):
            if fresh and column % group == 0:
                parameters = _renewed(parameters, new, format, column)
            now = new[:, column]
            found[:, column] = _nearest(now, format, parameters, groups[column])
            error = (now - xp.astype(found[:, column], new.dtype)) / upper[column, column]
            rest = slice(column + 1, stop)
            new[:, rest] = new[:, rest] - error[:, None] * upper[column, rest][None, :]
            errors[:, column - start] = error
        new[:, stop:] -= errors @ upper[start:stop, stop:]
    return found[:, xp.argsort(taken)], parameters


def _nearest(column: Array, format: NumberFormat, parameters: Parameters, group: int) -> Array:
    """Return a column `[rows]` on the nearest values, float32, under the scales of a group."""
    scales, zero_points, tensor_scale = parameters
    if format.group:
        scales = scales[:, group]
        zero_points = None if zero_points is None else zero_points[:, group]
    each = format.model_copy(update={"granularity": "channel", "group": 0})
    return rounded(column[:, None], each, scales, zero_points, tensor_scale)[:, 0]


def _renewed(parameters: Parameters, weight: Array, format: NumberFormat, column: int) -> Parameters:
    """Return parameters with those of the group that begins at a column taken from the weight."""
    xp = array_namespace(weight)
    group = column // format.group
    new = clipped_parameters(weight[:, column : column + format.group], format)
    parts = []
    for old, own in zip(parameters[:2], new[:2], strict=True):
        part = old if old is None else xp.asarray(old, copy=True)
        if part is not None:
            part[:, group] = own[:, 0]
        parts.append(part)
    scales, zero_points = parts
    return Parameters(scales, zero_points, parameters.tensor_scale)
