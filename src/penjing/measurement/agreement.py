"""How far the outputs of a file are from those of the model in memory that it was made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused

TOLERANCE = 1e-3
"""Largest relative difference that other kernels may make, of another runtime or another batch size."""


def difference(outputs: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return max|outputs - expected| / max|expected|; the absolute difference where `expected` is zero.

    >>> difference(np.array([1.0, 3.9]), np.array([1.0, 4.0]))
    0.025000000000000022

    Raises:
        Refused: the shapes differ, or a value is NaN or infinite.
    """
    if outputs.shape != expected.shape:
        raise Refused(
            f"the file's outputs must have the shape of the model's, {expected.shape}",
            value=outputs.shape,
            place="outputs",
            fix="export the model again; if it happens again, the runtime cannot carry this model",
        )
    a, b = np.asarray(outputs, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise Refused(
            "must be finite",
            value="NaN or infinity",
            place="outputs",
            fix="look for a division by zero or an overflow, in float16 above all",
        )
    if a.size == 0:
        return 0.0
    scale = float(np.abs(b).max())
    return float(np.abs(a - b).max()) / (scale or 1.0)
