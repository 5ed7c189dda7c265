"""Numbers to codes of a format and back: the one reference of every path that rounds.

Integers are those of ONNX's QuantizeLinear and DequantizeLinear, bit for bit in float32: half to even,
saturating. Functions take NumPy arrays or those of any library of the array API standard (PyTorch's among
them) and return the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from penjing.arrays.formats.layout import from_rows, to_rows
from penjing.arrays.formats.parameters import Parameters, code_type, parameters_of, refuse_unfit
from penjing.arrays.formats.tables import codes_of, table_of, values_of
from penjing.core.errors import Refused
from penjing.core.number_format import NumberFormat

Array = Any


@dataclass(frozen=True)
class Encoded:
    """A tensor in a number format.

    Attributes:
        codes: shape of the tensor, not packed: int8 or uint8, beyond 8 bits int16 or uint16. Integers and
            ternary hold the number itself, tables the bits (sign bit highest), binary 0 for -1 and 1 for 1.
        scales, zero_points, tensor_scale: as in `Parameters`.
        format: what the codes mean.
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    format: NumberFormat
    tensor_scale: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.codes.shape)

    @property
    def parameters(self) -> Parameters:
        """Scales and zero points, as `encode` takes them."""
        return Parameters(self.scales, self.zero_points, self.tensor_scale)


def encode(
    x: Array,
    format: NumberFormat,
    scales: Array | None = None,
    zero_points: Array | None = None,
    tensor_scale: Array | None = None,
) -> Encoded:
    """Round a tensor to the nearest values of a format; ties to the even code, saturating.

    Args:
        x: finite numbers, any shape that the format takes; computed in float32.
        scales, zero_points, tensor_scale: as in `Parameters`; without scales, those of the tensor's range.

    Raises:
        Refused: a value is NaN or infinite, the shape does not fit, or the format cannot have the scales.
    """
    xp = array_namespace(x)
    x = xp.astype(x, xp.float32)
    _refuse_not_finite(x, format)
    parameters = _complete(x, format, scales, zero_points, tensor_scale)
    codes = _codes(_in_steps(x, format, parameters), _zero_rows(parameters), format)
    codes = from_rows(xp.astype(codes, code_type(format, xp)), format, x.shape)
    return Encoded(codes, parameters.scales, parameters.zero_points, format, parameters.tensor_scale)


def decode(encoded: Encoded) -> Array:
    """Return the real values, float32, shape of the tensor.

    Raises:
        Refused: the scales do not fit the format or the shape.
    """
    refuse_unfit(encoded.parameters, encoded.shape, encoded.format)
    rows = to_rows(encoded.codes, encoded.format)
    xp = array_namespace(rows)
    values = _values(rows, _zero_rows(encoded.parameters), encoded.format)
    real = values * xp.reshape(encoded.parameters.steps, (-1, 1))
    return from_rows(real, encoded.format, encoded.shape)


def rounded(
    x: Array,
    format: NumberFormat,
    scales: Array | None = None,
    zero_points: Array | None = None,
    tensor_scale: Array | None = None,
) -> Array:
    """Return `decode(encode(x, ...))`, float32, without making codes ("fake quantization").

    With scales given, NaN stays NaN and infinities saturate, for use inside a network.

    Args and errors: those of `encode`, but for that.
    """
    xp = array_namespace(x)
    x = xp.astype(x, xp.float32)
    parameters = _complete(x, format, scales, zero_points, tensor_scale)
    steps, zero = _in_steps(x, format, parameters), _zero_rows(parameters)
    values = _values(_codes(steps, zero, format), zero, format)
    if format.kind == "binary" or table_of(format.kind) is not None:
        values = xp.where(xp.isnan(steps), steps, values)
    return from_rows(values * xp.reshape(parameters.steps, (-1, 1)), format, x.shape)


def _refuse_not_finite(x: Array, format: NumberFormat) -> None:
    xp = array_namespace(x)
    finite = xp.isfinite(x)
    if not bool(xp.all(finite)):
        bad = int(xp.sum(xp.astype(~finite, xp.int64)))
        raise Refused(
            "the values must be finite",
            value=f"{bad} NaN or infinite values",
            place=str(format),
            fix="check the weights or the data",
        )


def _complete(
    x: Array,
    format: NumberFormat,
    scales: Array | None,
    zero_points: Array | None,
    tensor_scale: Array | None,
) -> Parameters:
    if scales is None:
        if zero_points is not None or tensor_scale is not None:
            raise Refused(
                "zero points need scales beside them",
                value="no scales",
                place=str(format),
                fix="give all parameters or none",
            )
        return parameters_of(x, format)
    scales, zero_points, tensor_scale = (_as_array(v, x) for v in (scales, zero_points, tensor_scale))
    xp = array_namespace(x)
    given = Parameters(xp.astype(scales, xp.float32), zero_points, tensor_scale)
    refuse_unfit(given, tuple(x.shape), format)
    if zero_points is None:
        return given
    return given._replace(zero_points=xp.astype(zero_points, code_type(format, xp)))


def _as_array(value: Any, x: Array) -> Any:
    if isinstance(value, int | float):
        return array_namespace(x).asarray(value, device=device(x))
    return value


def _in_steps(x: Array, format: NumberFormat, parameters: Parameters) -> Array:
    """Return the values over their steps, `[scales, values]`; the quotient of huge values is infinite."""
    xp = array_namespace(x)
    with np.errstate(over="ignore"):
        return to_rows(x, format) / xp.reshape(parameters.steps, (-1, 1))


def _zero_rows(parameters: Parameters) -> Array | None:
    if parameters.zero_points is None:
        return None
    xp = array_namespace(parameters.zero_points)
    return xp.reshape(xp.astype(parameters.zero_points, xp.float32), (-1, 1))


def _codes(steps: Array, zero: Array | None, format: NumberFormat) -> Array:
    """Return the codes of values in steps; those of integers and ternary as float32, in which NaN stays."""
    xp = array_namespace(steps)
    table = table_of(format.kind)
    if table is not None:
        return codes_of(steps, table)
    if format.kind == "binary":
        return xp.astype(steps >= 0, xp.float32)
    whole = xp.round(steps)
    if zero is None:
        return xp.clip(whole, format.lowest, format.highest) + 0.0  # no negative zero
    return xp.clip(whole, format.lowest - zero, format.highest - zero) + zero


def _values(codes: Array, zero: Array | None, format: NumberFormat) -> Array:
    """Return the values of codes in steps, float32."""
    xp = array_namespace(codes)
    table = table_of(format.kind)
    if table is not None:
        return values_of(codes, table)
    values = xp.astype(codes, xp.float32)
    if format.kind == "binary":
        return 2 * values - 1
    return values if zero is None else values - zero
