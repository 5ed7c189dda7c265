"""Scales and zero points: from a range, from a tensor, and whether a format can store those given."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from penjing.arrays.formats.layout import row_lengths, to_rows
from penjing.arrays.formats.tables import Table, codes_of, table_of, values_of
from penjing.core.errors import Refused
from penjing.core.number_format import NumberFormat

Array = Any

TINY = float(np.finfo(np.float32).tiny)
POWERS_OF_TWO = ("mxfp4", "mxfp8", "mxfp8_e5m2")


class Parameters(NamedTuple):
    """What a tensor's codes are scaled by; in the order of `encode`'s arguments.

    Attributes:
        scales: float32, above 0, shape `NumberFormat.scale_shape`. Powers of two in mx formats; in nvfp4
            values of E4M3, to be multiplied by `tensor_scale`.
        zero_points: the codes that stand for 0, of the codes' type and the scales' shape; None where 0 does.
        tensor_scale: of nvfp4, float32 `()`; None otherwise.
    """

    scales: Array
    zero_points: Array | None = None
    tensor_scale: Array | None = None

    @property
    def steps(self) -> Array:
        """What one code differs by in real values, float32: the scales times the tensor's scale."""
        return self.scales if self.tensor_scale is None else self.scales * self.tensor_scale


def parameters_of_range(low: Array, high: Array, format: NumberFormat) -> Parameters:
    """Return the parameters with the smallest step whose codes cover [low, high].

    Integers: the range is widened to hold 0, which is exact (Jacob et al. 2018, "Quantization and Training
    of Neural Networks for Efficient Integer-Arithmetic-Only Inference"). Others: the largest magnitude is
    the largest value, in nvfp4 up to rounding of the scale. In mx formats the exponent of the magnitude is
    that of the largest value (OCP Microscaling Formats Specification 1.0, section 6.3), which saturates what
    is above. Where the range is 0, or too narrow for a normal float32 step, the scale is that of
    `nearest_scales` for 0.

    Args:
        low, high: numbers or arrays of the scales' shape, finite, low not above high.

    Raises:
        Refused: the range is not finite or is reversed, or has negative values that the format has not.

    >>> from penjing.core.number_format import number_format
    >>> int(parameters_of_range(-0.5, 2.05, number_format("uint8")).zero_points)
    50
    """
    low, high = (np.asarray(end) if isinstance(end, float | int) else end for end in (low, high))
    xp = array_namespace(low, high)
    low, high = xp.astype(low, xp.float64), xp.astype(high, xp.float64)
    if not bool(xp.all(xp.isfinite(low) & xp.isfinite(high) & (low <= high))):
        raise Refused(
            "the range must be finite and in order",
            value=f"[{xp.min(low)}, {xp.max(high)}]",
            place=str(format),
            fix="remove NaN and infinite values",
        )
    if not format.signed and format.symmetric and bool(xp.any(low < 0)):
        raise Refused(
            "the values of an unsigned symmetric format must be at least 0",
            value=float(xp.min(low)),
            place=str(format),
            fix="choose an asymmetric or a signed format",
        )
    zero = xp.zeros_like(low)
    low, high = xp.minimum(low, zero), xp.maximum(high, zero)
    if format.kind == "integer" and not format.symmetric:
        steps = _usable(xp.astype((high - low) / (format.highest - format.lowest), xp.float32))
        return Parameters(steps, _zero_points(low, steps, format))
    return storable(xp.astype(_reach(low, high, format), xp.float32), format)


def _reach(low: Array, high: Array, format: NumberFormat) -> Array:
    """Return the symmetric step that covers a range around 0; in mx formats before it becomes a power."""
    xp = array_namespace(low)
    if format.kind == "integer":
        above = high / format.highest
        return xp.maximum(low / format.lowest, above) if format.signed else above
    table = table_of(format.kind)
    if table is None:
        return xp.maximum(-low, high)
    return xp.maximum(-low, high) / (2.0**table.emax if format.kind in POWERS_OF_TWO else table.largest)


def _usable(steps: Array, instead: float = 1.0) -> Array:
    xp = array_namespace(steps)
    return xp.where(steps < TINY, xp.full_like(steps, instead), steps)


def _zero_points(low: Array, steps: Array, format: NumberFormat) -> Array:
    xp = array_namespace(low)
    points = xp.round(-low / xp.astype(steps, xp.float64)) + format.lowest
    return xp.astype(xp.clip(points, format.lowest, format.highest), code_type(format, xp))


def parameters_of(x: Array, format: NumberFormat) -> Parameters:
    """Return the parameters for the range of a tensor itself.

    Ternary and binary scales are means of magnitudes instead: Ma et al. 2024, "The era of 1-bit LLMs"
    (ternary), and Rastegari et al. 2016, "XNOR-Net", section 3.1 (binary, where it errs least in L2).

    Args:
        x: numbers of any shape that the format takes.

    Raises:
        Refused: a value is NaN or infinite, or the shape does not fit the granularity.
    """
    xp = array_namespace(x)
    shape = format.scale_shape(x.shape)
    rows = to_rows(xp.astype(x, xp.float32), format)
    if format.kind in ("ternary", "binary"):
        lengths = xp.astype(row_lengths(x, format)[:, 0], xp.float64)
        mean = xp.reshape(xp.sum(xp.abs(rows), axis=1, dtype=xp.float64) / lengths, shape)
        return parameters_of_range(-mean, mean, format)
    low, high = (xp.reshape(end(rows, axis=1), shape) for end in (xp.min, xp.max))
    return parameters_of_range(low, high, format)


def storable(steps: Array, format: NumberFormat) -> Parameters:
    """Return what a symmetric format stores for wanted steps.

    As `nearest_scales`; in nvfp4 under a tensor's scale that lets the largest step be E4M3's largest value
    ("Pretraining large language models with NVFP4", NVIDIA 2025, appendix B).

    Args:
        steps: float32, at least 0, of the scales' shape.
    """
    xp = array_namespace(steps)
    if format.kind != "nvfp4":
        return Parameters(nearest_scales(steps, format))
    whole = _usable(xp.astype(xp.astype(xp.max(steps), xp.float64) / _e4m3().largest, xp.float32))
    scales = nearest_scales(steps / whole, format)
    return Parameters(xp.where(steps < TINY, xp.ones_like(scales), scales), None, whole)


def nearest_scales(scales: Array, format: NumberFormat) -> Array:
    """Return scales that a format can store: in mx formats the powers of two at or below, in nvfp4 E4M3.

    Scales below float32's normal numbers, of zeros, become 1; in nvfp4 E4M3's smallest value, and in binary,
    which has no zero, the smallest normal number.

    Args:
        scales: float32, at least 0, any shape.
    """
    xp = array_namespace(scales)
    if format.kind in POWERS_OF_TWO:
        powers = xp.asarray(_powers(), device=device(scales))
        found = xp.searchsorted(powers, xp.reshape(_usable(scales), (-1,)), side="right") - 1
        return xp.reshape(xp.take(powers, found, axis=0), scales.shape)
    if format.kind == "nvfp4":
        return _to_e4m3(scales)
    return _usable(scales, TINY if format.kind == "binary" else 1.0)


def _e4m3() -> Table:
    table = table_of("fp8_e4m3")
    assert table is not None
    return table


def _to_e4m3(x: Array) -> Array:
    xp = array_namespace(x)
    nearest = values_of(codes_of(x, _e4m3()), _e4m3())
    return xp.where(nearest > 0, nearest, xp.full_like(nearest, float(_e4m3().values[1])))


@cache
def _powers() -> NDArray[np.float32]:
    """Return what E8M0 can store, 2**-127 to 2**127, rising."""
    return np.ldexp(1.0, np.arange(-127, 128)).astype(np.float32)


def refuse_unfit(parameters: Parameters, shape: tuple[int, ...], format: NumberFormat) -> None:
    """Refuse parameters that a tensor of this shape cannot have in this format.

    Raises:
        Refused: with the first rule that does not hold.
    """
    scales, points, whole = parameters
    wanted = format.scale_shape(shape)
    xp = array_namespace(scales)
    value, fix = f"shape {tuple(scales.shape)}", "take them from parameters_of or parameters_of_range"
    rules = [(f"scales have shape {wanted}", tuple(scales.shape) == wanted)]
    if rules[0][1]:
        good = xp.isfinite(scales) & (scales > 0)
        if format.kind in POWERS_OF_TWO:
            good = good & xp.isin(scales, xp.asarray(_powers(), device=device(scales)))
        if format.kind == "nvfp4":
            good = good & (_to_e4m3(scales) == scales)
        value = f"{int(xp.sum(xp.astype(~good, xp.int64)))} scales that are not"
        what = {"nvfp4": " values of E4M3"}.get(format.kind, "")
        what = " powers of two" if format.kind in POWERS_OF_TWO else what
        rules.append((f"scales are positive, finite{what and ',' + what}", bool(xp.all(good))))
    rules += [
        ("zero points are given for asymmetric formats only", (points is None) == format.symmetric),
        ("zero points have the scales' shape", points is None or tuple(points.shape) == wanted),
        ("a tensor scale is given for nvfp4 only", (whole is None) == (format.kind != "nvfp4")),
    ]
    if points is not None:
        points = xp.astype(points, xp.int64)
        inside = bool(xp.all((points >= format.lowest) & (points <= format.highest)))
        rules.append((f"zero points are from {format.lowest} to {format.highest}", inside))
    if whole is not None:
        rules.append(
            ("the tensor scale is one positive number", whole.shape == () and 0 < float(whole) < math.inf)
        )
    for rule, holds in rules:
        if not holds:
            raise Refused(
                rule, value=value if rule.startswith("scales") else None, place=str(format), fix=fix
            )


def code_type(format: NumberFormat, xp: Any) -> Any:
    """Return the type of a format's codes in a library: 8 bits, or 16 for more, signed where codes are."""
    signed = format.lowest < 0
    if format.bits > 8:
        return xp.int16 if signed else xp.uint16
    return xp.int8 if signed else xp.uint8
