"""The second moments of a layer's inputs, which say what an error in each weight costs at the outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

Array = Any

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean (Frantar & Alistarh 2023, SparseGPT)."""


class Gram:
    """The mean of x xᵀ over rows, accumulated in double precision.

    Memory: `groups * columns**2 * 8` bytes, whatever the number of rows.

    Attributes:
        total: the sum, `[groups, columns, columns]`.
        rows: how many were added.
    """

    def __init__(self, groups: int, columns: int) -> None:
        self.total: NDArray[np.float64] = np.zeros((groups, columns, columns))
        self.rows = 0

    def add(self, x: NDArray[Any]) -> None:
        """Add rows `[rows, groups * columns]`."""
        groups, columns, _ = self.total.shape
        x = x.astype(np.float64).reshape(len(x), groups, columns)
        if groups == 1:
            # One matrix on both sides: the product is symmetric, and half the work.
            self.total[0] += x[:, 0].T @ x[:, 0]
        else:
            x = np.ascontiguousarray(x.transpose(1, 0, 2))
            self.total += x.transpose(0, 2, 1) @ x
        self.rows += x.shape[1] if groups > 1 else len(x)

    @property
    def mean(self) -> NDArray[np.float64]:
        """`[groups, columns, columns]`; zeros before anything was added."""
        return self.total / max(self.rows, 1)


def damped(gram: Array, share: float = DAMPING) -> Array:
    """Return a positive definite Gram matrix: `share` of the mean diagonal added to the diagonal.

    Weights of inputs that are always zero so keep a small price by their magnitude.

    Args:
        gram: `[columns, columns]`.
        share: above 0.
    """
    xp = array_namespace(gram)
    mean = xp.mean(xp.linalg.diagonal(gram))
    extra = xp.where(mean > 0, share * mean, xp.ones_like(mean))
    return gram + extra * xp.eye(gram.shape[0], dtype=gram.dtype)


def output_error(change: Array, gram: Array) -> float:
    """Return the mean squared change of the outputs, summed over them: trace(Δ G Δᵀ).

    Args:
        change: of the weights, `[out, columns]`.
        gram: mean of x xᵀ, `[columns, columns]`.
    """
    xp = array_namespace(change, gram)
    return max(float(xp.sum((change @ gram) * change)), 0.0)
