"""The second moments of a layer's inputs, which say what an error in each weight costs at the outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

Array = Any

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean (Frantar & Alistarh 2023, SparseGPT)."""

STRIP = 512
"""Columns of second moments that a product is taken for at a time."""


class Gram:
    """The mean of x xᵀ over rows, and of z xᵀ for wanted inputs z, accumulated in double precision.

    Memory: `groups * columns**2 * 8` bytes, whatever the number of rows; twice that with wanted inputs.

    Attributes:
        total: the sum of x xᵀ, `[groups, columns, columns]`.
        crossed: the sum of z xᵀ; None where no z was given.
        rows: how many were added.
    """

    def __init__(self, groups: int, columns: int) -> None:
        self.total: NDArray[np.float64] = np.zeros((groups, columns, columns))
        self.crossed: NDArray[np.float64] | None = None
        self.rows = 0

    def add(self, x: NDArray[Any], wanted: NDArray[Any] | None = None) -> None:
        """Add rows `[rows, groups * columns]`, and what they should have been."""
        self.rows += len(x)
        x = self._split(x)
        columns = x.shape[2]
        for start in range(0, columns, STRIP):
            # A strip at a time, up to the diagonal: half the work, and no second matrix.
            strip, before = slice(start, start + STRIP), slice(0, start)
            self.total[:, strip, : start + STRIP] += (
                x[:, :, strip].transpose(0, 2, 1) @ x[:, :, : start + STRIP]
            )
            self.total[:, before, strip] = self.total[:, strip, before].transpose(0, 2, 1)
        if wanted is not None:
            self.crossed = np.zeros_like(self.total) if self.crossed is None else self.crossed
            aims = self._split(wanted).transpose(0, 2, 1)
            for start in range(0, columns, STRIP):
                self.crossed[:, start : start + STRIP] += aims[:, start : start + STRIP] @ x

    def _split(self, x: NDArray[Any]) -> NDArray[np.float64]:
        groups, columns, _ = self.total.shape
        return np.ascontiguousarray(x.astype(np.float64).reshape(len(x), groups, columns).transpose(1, 0, 2))

    @property
    def mean(self) -> NDArray[np.float64]:
        """`[groups, columns, columns]`; zeros before anything was added."""
        return self.total / max(self.rows, 1)

    @property
    def drift(self) -> NDArray[np.float64] | None:
        """The mean of (z − x) xᵀ, `[groups, columns, columns]`; None where no z was given."""
        return None if self.crossed is None else (self.crossed - self.total) / max(self.rows, 1)


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


def compensated(weight: Array, gram: Array, drift: Array) -> Array:
    """Return the weight whose outputs on the inputs at hand are nearest to the old one's on wanted inputs.

    The minimum of E‖Vx − Wz‖² + damping ‖V − W‖² over V: W + W E[(z − x) xᵀ] G⁻¹. What a layer aims at when
    layers before it have changed its inputs (the asymmetric calibration of Li et al. 2025, GPTAQ).

    Args:
        weight: W, `[rows, columns]`.
        gram: damped mean of x xᵀ, `[columns, columns]`.
        drift: mean of (z − x) xᵀ, `[columns, columns]`.
    """
    xp = array_namespace(weight, gram)
    return weight + xp.matrix_transpose(xp.linalg.solve(gram, xp.matrix_transpose(weight @ drift)))


def output_error(change: Array, gram: Array) -> float:
    """Return the mean squared change of the outputs, summed over them: trace(Δ G Δᵀ).

    Args:
        change: of the weights, `[out, columns]`.
        gram: mean of x xᵀ, `[columns, columns]`.
    """
    xp = array_namespace(change, gram)
    return max(float(xp.sum((change @ gram) * change)), 0.0)
