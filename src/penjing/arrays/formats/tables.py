"""Formats whose values stand in a table: rounding to the nearest one, ties to even codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from penjing.core.number_format import Kind

Array = Any
"""An array of NumPy or of any library of the array API standard."""

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Table:
    """The values of a format by code.

    Attributes:
        values: by code, float32; NaN and infinite where a code stands for that.
        thresholds: a magnitude rounds to the number of thresholds below it, float32, rising.
        sign: the bit of a code that holds the sign, 0 where values are looked up with their sign.
        emax: exponent of the largest value's power of two.
    """

    values: NDArray[np.float32]
    thresholds: NDArray[np.float32]
    sign: int
    emax: int

    @property
    def largest(self) -> float:
        """Largest finite value."""
        return float(self.values[len(self.thresholds)])


@cache
def table_of(kind: Kind) -> Table | None:
    """Return the table of a kind's elements; None for integers, ternary and binary.

    Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3 without infinity, E5M2); OCP Microscaling
    Formats Specification 1.0, section 5.3 (E2M1); Dettmers et al. 2023, "QLoRA", appendix E (nf4).
    """
    if kind in ("fp8_e4m3", "mxfp8"):
        return _minifloat(exponent=4, mantissa=3, finite=127)
    if kind in ("fp8_e5m2", "mxfp8_e5m2"):
        return _minifloat(exponent=5, mantissa=2, finite=124)
    if kind in ("mxfp4", "nvfp4"):
        return _minifloat(exponent=2, mantissa=1, finite=8)
    if kind == "nf4":
        values = np.array(_NF4, np.float32)
        return Table(values, _thresholds(values), 0, 0)
    return None


def _minifloat(exponent: int, mantissa: int, finite: int) -> Table:
    """Return a float of one sign bit, by its bits; `finite` codes from 0 up stand for numbers."""
    codes = np.arange(2 ** (exponent + mantissa))
    power, fraction = codes >> mantissa, codes & (2**mantissa - 1)
    bias = 2 ** (exponent - 1) - 1
    significand = (fraction + (power > 0) * 2**mantissa).astype(np.float64)
    values = np.ldexp(significand, np.maximum(power, 1) - bias - mantissa)
    values[finite:] = np.nan
    if exponent == 5:
        values[finite] = np.inf
    both = np.concatenate([values, -values]).astype(np.float32)
    emax = int(power[finite - 1]) - bias
    return Table(both, _thresholds(both[:finite]), 2 ** (exponent + mantissa), emax)


def _thresholds(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the middles between neighbours, lowered by the least bit where a tie belongs above (even)."""
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    odd_below = np.arange(len(middles)) % 2 == 1
    return np.where(odd_below, np.nextafter(middles, np.float32(-np.inf)), middles)


def codes_of(x: Array, table: Table) -> Array:
    """Return the code of the value nearest to each, saturating; ties to the even code; NaN has any code.

    Args:
        x: float32, any shape.

    Returns:
        The default integer type of the library, shape of x.
    """
    xp = array_namespace(x)
    flat = xp.reshape(xp.abs(x) if table.sign else x, (-1,))
    found = xp.searchsorted(xp.asarray(table.thresholds, device=device(x)), flat)
    found = xp.reshape(found, x.shape)
    if not table.sign:
        return found
    return found + table.sign * xp.astype(xp.signbit(x), found.dtype)


def values_of(codes: Array, table: Table) -> Array:
    """Return the values of codes (any integer type), float32, shape of the codes."""
    xp = array_namespace(codes)
    flat = xp.reshape(xp.astype(codes, xp.int64), (-1,))
    found = xp.take(xp.asarray(table.values, device=device(codes)), flat, axis=0)
    return xp.reshape(found, codes.shape)
