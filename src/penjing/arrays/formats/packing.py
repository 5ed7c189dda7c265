"""Codes of fewer than 8 bits (or of any width to 16) side by side in bytes, and back."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace, device

from penjing.core.errors import Refused

Array = Any


def pack(codes: Array, bits: int) -> Array:
    """Pack the last axis of codes into bytes, the first code in the lowest bits.

    As ONNX stores int4, uint4, int2 and uint2 tensors (of a flattened tensor), and ONNX Runtime's
    MatMulNBits the codes of each group. Negative codes become two's complement. The last byte is filled
    up with zeros.

    Args:
        codes: integers `[..., n]`, from `-2**(bits - 1)` to `2**bits - 1`.
        bits: of a code, 1 to 16.

    Returns:
        uint8 `[..., ceil(n * bits / 8)]`.

    Raises:
        Refused: a code has more bits, or there is no axis.

    >>> import numpy as np
    >>> pack(np.array([1, -1, 3], np.int8), 4)
    array([241,   3], dtype=uint8)
    """
    xp = array_namespace(codes)
    _refuse_width(codes, bits)
    codes = xp.astype(codes, xp.int32)
    if math.prod(codes.shape) and not (
        int(xp.min(codes)) >= -(2 ** (bits - 1)) and int(xp.max(codes)) < 2**bits
    ):
        raise Refused(
            f"the codes must fit in {bits} bits",
            value=f"{int(xp.min(codes))} to {int(xp.max(codes))}",
            place="pack",
            fix="encode in the format that is packed",
        )
    unit, size = _unit(bits)
    count = codes.shape[-1]
    parts = _in_units(codes & (2**bits - 1), unit)
    columns = []
    for byte in range(size):
        total = xp.zeros_like(parts[..., 0])
        for place in range(unit):
            shift = place * bits - 8 * byte
            if -bits < shift < 8:
                total = total | (
                    (parts[..., place] << shift) if shift >= 0 else (parts[..., place] >> -shift)
                )
        columns.append(total & 255)
    packed = xp.reshape(xp.stack(columns, axis=-1), (*codes.shape[:-1], parts.shape[-2] * size))
    return xp.astype(packed[..., : -(-count * bits // 8)], xp.uint8)


def unpack(packed: Array, bits: int, count: int, signed: bool) -> Array:
    """Undo `pack`.

    Args:
        packed: uint8 `[..., bytes]`.
        bits: of a code, 1 to 16.
        count: how many codes the last axis has.
        signed: whether codes are two's complement.

    Returns:
        `[..., count]`, int8 or uint8, beyond 8 bits int16 or uint16.

    Raises:
        Refused: not the number of bytes that this many codes have.
    """
    xp = array_namespace(packed)
    _refuse_width(packed, bits)
    if packed.shape[-1] != -(-count * bits // 8):
        raise Refused(
            f"{count} codes of {bits} bits must have {-(-count * bits // 8)} bytes",
            value=packed.shape[-1],
            place="unpack",
            fix="give the tensor's own shape",
        )
    unit, size = _unit(bits)
    parts = _in_units(xp.astype(packed, xp.int32), size)
    columns = []
    for place in range(unit):
        total = xp.zeros_like(parts[..., 0])
        for byte in range(size):
            shift = place * bits - 8 * byte
            if -bits < shift < 8:
                total = total | ((parts[..., byte] >> shift) if shift >= 0 else (parts[..., byte] << -shift))
        columns.append(total & (2**bits - 1))
    codes = xp.reshape(xp.stack(columns, axis=-1), (*packed.shape[:-1], parts.shape[-2] * unit))[..., :count]
    if signed:
        codes = codes - ((codes >> (bits - 1)) << bits)
        return xp.astype(codes, xp.int8 if bits <= 8 else xp.int16)
    return xp.astype(codes, xp.uint8 if bits <= 8 else xp.uint16)


def _unit(bits: int) -> tuple[int, int]:
    """Return the fewest codes that fill whole bytes, and how many bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _in_units(x: Array, length: int) -> Array:
    """Return the last axis in units, the last one filled up with zeros: `[..., units, length]`."""
    xp = array_namespace(x)
    missing = -x.shape[-1] % length
    if missing:
        x = xp.concat([x, xp.zeros((*x.shape[:-1], missing), dtype=x.dtype, device=device(x))], axis=-1)
    return xp.reshape(x, (*x.shape[:-1], x.shape[-1] // length, length))


def _refuse_width(array: Array, bits: int) -> None:
    if not (1 <= bits <= 16 and len(array.shape)):
        raise Refused(
            "must have 1 to 16 bits and at least one axis",
            value=f"{bits} bits, shape {tuple(array.shape)}",
            place="pack",
            fix="flatten the codes",
        )
