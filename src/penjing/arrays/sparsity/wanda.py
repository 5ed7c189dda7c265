"""Wanda: the magnitude of a weight times the norm of its input."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from penjing.arrays.sparsity.patterns import Pattern, mask_of

Array = Any


def wanda(weight: Array, gram: Array, sparsity: float, pattern: Pattern) -> tuple[Array, Array]:
    """Make the weights of least |W_ij| · ‖X_j‖ zero, compared within each output.

    (Sun et al. 2023, "A simple and effective pruning approach for large language models", eq. 1.) Blocks go
    by the sum of squares.

    Args:
        weight: `[rows, columns]`, columns in the pattern's `column_order`.
        gram: mean of x xᵀ, `[columns, columns]`; its diagonal is ‖X_j‖² over the number of rows.
        sparsity: share of zeros in (0, 1), of each row (of blocks); N:M has its own.
        pattern: the matrix fits it.

    Returns:
        The new weight, and its mask (True where kept).
    """
    xp = array_namespace(weight, gram)
    mask = mask_of(weight**2 * xp.linalg.diagonal(gram), sparsity, pattern, "row")
    return xp.where(mask, weight, xp.zeros_like(weight)), mask
