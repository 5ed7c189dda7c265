"""Sparse arrays as one bit for each entry and the values that are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(array: NDArray[Any], mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return an array as `(bits, values)`: a bit for each entry, and the kept entries in C order.

    The first entry is the highest bit of the first byte; the last byte is filled with zeros. Beats the dense
    array as soon as more than one entry in 32 (of four bytes each) goes, and coordinate lists below about 97%
    sparsity.

    Args:
        array: any shape.
        mask: the same shape, True where an entry is kept; what it leaves out must be zero.

    Raises:
        ValueError: the shapes differ, or an entry that is left out is not zero.

    >>> bits, values = pack(np.array([[0.0, 2.0], [0.0, 3.0]]), np.array([[False, True], [False, True]]))
    >>> bits.tolist(), values.tolist()
    ([80], [2.0, 3.0])
    """
    if array.shape != mask.shape:
        raise ValueError(f"array {array.shape} and mask {mask.shape} differ in shape")
    kept = np.asarray(mask, dtype=bool).ravel()
    flat = array.ravel()
    if np.any(flat[~kept] != 0):
        raise ValueError("an entry that the mask leaves out is not zero")
    return np.packbits(kept), np.ascontiguousarray(flat[kept])


def unpack_mask(bits: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the mask of `pack`, in its shape.

    Raises:
        ValueError: another number of bits than the shape needs.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if bits.dtype != np.uint8 or bits.shape != ((size + 7) // 8,):
        raise ValueError(f"{bits.dtype} bits of shape {bits.shape} do not fit an array of shape {shape}")
    return np.unpackbits(bits, count=size).astype(bool).reshape(shape)


def unpack(bits: NDArray[np.uint8], values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array that `pack` took, in the type of `values`.

    Raises:
        ValueError: bits that do not fit the shape, or another number of values than bits that are set.
    """
    mask = unpack_mask(bits, shape)
    count = int(mask.sum())
    if values.shape != (count,):
        raise ValueError(f"{count} bits are set for values of shape {values.shape}")
    array = np.zeros(shape, dtype=values.dtype)
    array[mask] = values
    return array
