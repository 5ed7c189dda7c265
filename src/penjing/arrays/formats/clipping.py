"""Clip search: the scales with which rounding to nearest errs least."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from penjing.arrays.formats.coding import rounded
from penjing.arrays.formats.layout import to_rows
from penjing.arrays.formats.parameters import POWERS_OF_TWO, Parameters, nearest_scales, parameters_of
from penjing.core.number_format import NumberFormat

Array = Any

SHRINKS = tuple(1 - 0.02 * step for step in range(41))
"""Factors for most formats: the whole range to a fifth of it."""

_OWN_FACTORS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(POWERS_OF_TWO, (1.0, 2.0, 0.5, 0.25)),
    "ternary": (1.0, *(0.5 + 0.05 * step for step in range(51))),
    "binary": (1.0,),
}
"""Scales of ternary and binary start from means, mx formats move by powers of two; binary is exact."""


def clipped_parameters(
    x: Array, format: NumberFormat, factors: tuple[float, ...] | None = None, importance: Array | None = None
) -> Parameters:
    """Return, for each scale, the one of a grid of factors times `parameters_of` that errs least in L2.

    What exceeds the range saturates; zero points stay. The free baseline of weight quantization (Nagel et
    al. 2021, "A White Paper on Neural Network Quantization", section 3.1, "MSE").

    Args:
        x: weights `[out, in, *kernel]`, or any shape that the format takes.
        factors: above 0, to choose from, the first one wins ties; None: `SHRINKS`, or what suits the kind.
        importance: what a squared error of each value counts, at least 0, of a shape that broadcasts to that
            of x; None: all the same.

    Returns:
        Parameters whose error is, for every scale, at most that of `parameters_of` where 1 is a factor.

    Raises:
        Refused: a value is NaN or infinite, or the shape does not fit the granularity.

    >>> import numpy as np
    >>> from penjing.core.number_format import number_format
    >>> weight = np.append(np.tile(np.float32([-1, 1]), 50), np.float32(6)).reshape(1, -1)
    >>> clipped_parameters(weight, number_format("int2 narrow channel")).scales
    array([1.2], dtype=float32)
    """
    xp = array_namespace(x)
    x = xp.astype(x, xp.float32)
    start = parameters_of(x, format)
    price: Array = 1.0 if importance is None else xp.astype(importance, xp.float32)
    first, *others = factors or _OWN_FACTORS.get(format.kind, SHRINKS)
    best = nearest_scales(start.scales * first, format)
    least = _error(x, format, start._replace(scales=best), price)
    for factor in others:
        scales = nearest_scales(start.scales * factor, format)
        error = _error(x, format, start._replace(scales=scales), price)
        best, least = xp.where(error < least, scales, best), xp.minimum(error, least)
    return start._replace(scales=best)


def _error(x: Array, format: NumberFormat, parameters: Parameters, importance: Array) -> Array:
    """Return the weighed squared error of rounding under each scale, float64, shape of the scales."""
    xp = array_namespace(x)
    gap = rounded(x, format, *parameters) - x
    return xp.reshape(
        xp.sum(to_rows(gap * gap * importance, format), axis=1, dtype=xp.float64), parameters.scales.shape
    )
