"""SparseGPT: one sweep over the columns; what each pruned weight cost is made up for by later columns."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace

from penjing.arrays.sparsity.patterns import Pattern, block_sums, expand_blocks, kept_count, mask_of, top

Array = Any

COLUMNS = 128
"""Columns of which the mask is chosen at once (the paper's best block size)."""


def sparsegpt(weight: Array, gram: Array, sparsity: float, pattern: Pattern) -> tuple[Array, Array]:
    """Prune and update a matrix so that its outputs change little.

    The mask of each block of columns is chosen when the sweep comes to it, by w² / [H⁻¹]², on weights that
    already make up for what went before; N:M chooses for each group. (Frantar & Alistarh 2023, "SparseGPT:
    Massive language models can be accurately pruned in one-shot", algorithm 1.)

    Args:
        weight: `[rows, columns]` in double precision, columns in the pattern's `column_order`.
        gram: damped mean of x xᵀ, `[columns, columns]`, positive definite.
        sparsity: share of zeros in (0, 1), over all rows together; N:M has its own.
        pattern: the matrix fits it.

    Returns:
        The new weight, and its mask (True where kept).
    """
    xp = array_namespace(weight, gram)
    upper = xp.linalg.cholesky(xp.linalg.inv(gram), upper=True)
    pivots = xp.linalg.diagonal(upper)
    new, parts, pruned = xp.asarray(weight, copy=True), [], 0
    width = _block_width(pattern)
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        if pattern.group:
            step, first = pattern.group, None
        else:
            zeros = _zeros_up_to(weight.shape, stop, sparsity, pattern)
            step, first = stop - start, zeros - pruned
            pruned = zeros
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            saliency = (new[:, begin:end] / pivots[begin:end]) ** 2
            keep = _choose(saliency, pattern, first)
            parts.append(keep)
            errors = _sweep(new, keep, upper, begin, end)
            new[:, end:] = new[:, end:] - errors @ upper[begin:end, end:]
    return new, xp.concat(parts, axis=1)


def _sweep(new: Array, keep: Array, upper: Array, begin: int, end: int) -> Array:
    """Prune columns one by one, correcting those after them inside the block; return the scaled errors."""
    xp = array_namespace(new)
    errors = xp.zeros((new.shape[0], end - begin), dtype=new.dtype)
    for column in range(begin, end):
        now = new[:, column]
        left = xp.where(keep[:, column - begin], now, xp.zeros_like(now))
        error = (now - left) / upper[column, column]
        rest = slice(column + 1, end)
        new[:, rest] = new[:, rest] - error[:, None] * upper[column, rest][None, :]
        new[:, column] = left
        errors[:, column - begin] = error
    return errors


def _choose(saliency: Array, pattern: Pattern, zeros: int | None) -> Array:
    """Return the mask of a block of columns; `zeros` is how many blocks of the pattern go, None for N:M."""
    if zeros is None:
        return mask_of(saliency, 0.0, pattern)
    tiles = block_sums(saliency, pattern)
    chosen = top(tiles.reshape((1, -1)), math.prod(tiles.shape) - zeros).reshape(tiles.shape)
    return expand_blocks(chosen, pattern)


def _block_width(pattern: Pattern) -> int:
    unit = pattern.group or pattern.columns
    return max(COLUMNS // unit, 1) * unit


def _zeros_up_to(shape: tuple[int, ...], stop: int, sparsity: float, pattern: Pattern) -> int:
    """Return how many tiles are zero in the first `stop` columns, so that the total comes out exactly."""
    rows, columns = shape[0] // pattern.rows, shape[1] // pattern.columns
    total = rows * columns - kept_count(rows * columns, sparsity)
    return total * (stop // pattern.columns) // columns
