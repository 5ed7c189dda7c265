"""Exact optimal brain surgeon on a layer: row by row the weight that costs least, all others corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from penjing.arrays.sparsity.allocation import allocate
from penjing.arrays.sparsity.patterns import Pattern, expand_blocks, kept_count

Array = Any

VALUES = 2**20
"""Entries of matrices that are worked on at once: few enough for a processor's cache."""
SHRINK = 8
"""What was removed is left out of the matrices once it is this part of them."""


@dataclass(frozen=True)
class Removals:
    """In which order the blocks of each row (of blocks) go, and what that costs.

    Attributes:
        order: indices of blocks, `[rows, steps]`.
        errors: `[rows, steps + 1]`, the error of the outputs after 0, 1, 2, ... removals, all other weights
            of the row at their optimum; nondecreasing.
        blocks: how many blocks a row has; `steps` is less with N:M.
    """

    order: NDArray[np.int64]
    errors: NDArray[np.float64]
    blocks: int

    def mask(self, counts: NDArray[np.int64], pattern: Pattern) -> NDArray[np.bool_]:
        """Return the mask `[rows, columns]` after so many removals of each row (of blocks)."""
        rows, steps = self.order.shape
        tiles = np.ones((rows, self.blocks), bool)
        gone = np.arange(steps) < counts[:, None]
        tiles[np.nonzero(gone)[0], self.order[gone]] = False
        kept: NDArray[np.bool_] = expand_blocks(tiles, pattern)
        return kept


def removals(weight: Array, gram: Array, pattern: Pattern) -> Removals:
    """Return for every row the greedy order of removal, with the exact error at each level of sparsity.

    Each step removes the block P of least w_P ([H⁻¹]_PP)⁻¹ w_Pᵀ, corrects the rest of the row, and takes P
    out of H⁻¹ by one step of elimination. (Frantar, Singh & Alistarh 2022, "Optimal brain compression",
    algorithm 1 and section 4; Hassibi & Stork 1992 for one weight.) Blocks of several rows go together.

    Args:
        weight: `[rows, columns]` in double precision, columns in the pattern's `column_order`.
        gram: damped mean of x xᵀ, `[columns, columns]`, positive definite.
        pattern: the matrix fits it; with N:M no group loses more than it may.
    """
    xp = array_namespace(weight, gram)
    inverse, columns = xp.linalg.inv(gram), weight.shape[1]
    blocks = columns // pattern.columns
    rows = weight.reshape((-1, pattern.rows, blocks, pattern.columns))
    size, found = max(1, VALUES // columns**2), []
    for start in range(0, rows.shape[0], size):
        sweep = _Sweep(rows[start : start + size, ...], inverse, pattern)
        while sweep.left:
            sweep.step()
        found.append((xp.stack(sweep.order, axis=1), xp.stack(sweep.costs, axis=1)))
    order, costs = (np.concatenate([np.asarray(x) for x in part]) for part in zip(*found, strict=True))
    errors = np.concatenate([np.zeros((len(costs), 1)), np.maximum(costs, 0).cumsum(axis=1)], axis=1)
    return Removals(order, errors, blocks)


class _Sweep:
    """A few rows (of blocks) at work: `n` of them, each with `k` blocks of `c` columns still listed.

    The inverse without the blocks removed is kept as the first inverse less `roots`ᵀ `roots`, of which only
    the diagonal blocks and the lines of the next removal are ever formed.
    """

    def __init__(self, weight: Array, inverse: Array, pattern: Pattern) -> None:
        xp = array_namespace(weight, inverse)
        n, _, k, c = weight.shape
        quota = pattern.group - pattern.kept
        self.xp, self.group, self.inverse, self.weight = xp, pattern.group, inverse, weight
        self.each = xp.arange(n)
        self.left = k * quota // pattern.group if pattern.group else k
        self.quotas = xp.full((n, k // pattern.group), quota) if pattern.group else None
        self.names = xp.tile(xp.arange(k)[None, :], (n, 1))
        self.alive = xp.ones((n, k), dtype=xp.bool)
        index = xp.arange(k)
        self.pivots = xp.tile(inverse.reshape((k, c, k, c))[index, :, index, :][None, ...], (n, 1, 1, 1))
        self.roots = xp.zeros((n, self.left * c, k, c), dtype=inverse.dtype)
        self.order: list[Array] = []
        self.costs: list[Array] = []

    def step(self) -> None:
        """Remove from each row the block that costs least."""
        xp, each, (n, rows, k, c) = self.xp, self.each, self.weight.shape
        cost, solved = self._costs()
        p = xp.argmin(xp.where(self._free(), cost, xp.full_like(cost, float("inf"))), axis=1)
        self.order.append(self.names[each, p])
        self.costs.append(cost[each, p])
        lines = self._lines(p)
        change = solved[each, :, p, :] @ lines.reshape((n, c, k * c))
        self.alive[each, p] = False
        weight = self.weight - change.reshape((n, rows, k, c))
        self.weight = xp.where(self.alive[:, None, :, None], weight, xp.zeros_like(weight))
        self._eliminate(lines, self.pivots[each, p, ...])
        if self.quotas is not None:
            self.quotas[each, self.names[each, p] // self.group] -= 1
        self.left -= 1
        if int(xp.sum(xp.astype(self.alive[0, :], xp.int64))) * SHRINK <= k * (SHRINK - 1) and self.left:
            self._compact()

    def _free(self) -> Array:
        if self.quotas is None:
            return self.alive
        return self.alive & (self.quotas[self.each[:, None], self.names // self.group] > 0)

    def _costs(self) -> tuple[Array, Array]:
        """Return what losing each block costs, and w_P ([H⁻¹]_PP)⁻¹, from which the correction follows."""
        xp, c = self.xp, self.weight.shape[3]
        eye = xp.eye(c, dtype=self.pivots.dtype)
        pivots = xp.where(self.alive[:, :, None, None], self.pivots, eye)
        if c == 1:
            solved = self.weight / pivots[:, None, :, :, 0]
        else:
            columns = xp.permute_dims(self.weight, (0, 2, 3, 1))
            solved = xp.permute_dims(xp.linalg.solve(pivots, columns), (0, 3, 1, 2))
        return xp.sum(solved * self.weight, axis=(1, 3)), solved

    def _lines(self, p: Array) -> Array:
        """Return the lines of the present inverse at block p of each row, `[n, c, k, c]`."""
        xp, each, (n, _, k, c) = self.xp, self.each, self.weight.shape
        done = c * len(self.order) - c
        own = self.names[each, p][:, None] * c + xp.arange(c)[None, :]
        columns = (self.names[:, :, None] * c + xp.arange(c)).reshape((n, k * c))
        first = self.inverse[own[:, :, None], columns[:, None, :]]
        roots = self.roots[:, :done, :, :].reshape((n, done, k * c))
        at = xp.matrix_transpose(self.roots[:, :done, :, :][each, :, p, :])
        return (first - at @ roots).reshape((n, c, k, c))

    def _eliminate(self, lines: Array, pivot: Array) -> None:
        xp, (n, c, k, _) = self.xp, lines.shape
        flat = lines.reshape((n, c, k * c))
        root = flat / xp.sqrt(pivot) if c == 1 else xp.linalg.solve(xp.linalg.cholesky(pivot), flat)
        root = root.reshape((n, c, k, c))
        done = c * len(self.order) - c
        self.roots[:, done : done + c, :, :] = root
        by_block = xp.permute_dims(root, (0, 2, 1, 3))
        self.pivots = self.pivots - xp.matrix_transpose(by_block) @ by_block

    def _compact(self) -> None:
        """Drop what was removed from the lists; every row has lost equally much."""
        xp, each = self.xp, self.each[:, None]
        kept = int(xp.sum(xp.astype(self.alive[0, :], xp.int64)))
        index = xp.argsort(xp.astype(~self.alive, xp.int8), axis=1, stable=True)[:, :kept]
        self.names, self.pivots = self.names[each, index], self.pivots[each, index, ...]
        self.weight = xp.permute_dims(self.weight[each, :, index, :], (0, 2, 1, 3))
        self.roots = xp.permute_dims(self.roots[each, :, index, :], (0, 2, 1, 3))
        self.alive = xp.ones(self.names.shape, dtype=xp.bool)


def refit(weight: Array, gram: Array, mask: Array) -> Array:
    """Return the weights on a support whose outputs are nearest to the dense ones, exactly: row by row.

    What the sweep of `removals` ends with, without the rounding that its steps gather.

    Args:
        weight: `[rows, columns]`.
        gram: `[columns, columns]`, positive definite.
        mask: booleans `[rows, columns]`, True where kept.
    """
    xp = array_namespace(weight, gram)
    wanted, new = weight @ gram, xp.zeros_like(weight)
    for row in range(weight.shape[0]):
        (kept,) = xp.nonzero(mask[row, :])
        new[row, kept] = xp.linalg.solve(gram[kept[:, None], kept[None, :]], wanted[row, kept][:, None])[:, 0]
    return new


def obc(weight: Array, gram: Array, sparsity: float, pattern: Pattern) -> tuple[Array, Array]:
    """Prune a matrix by exact optimal brain surgeon, rows sharing the zeros as costs least.

    Args:
        weight, gram, pattern: as of `removals`.
        sparsity: share of zeros in (0, 1), over all rows together; N:M has its own.

    Returns:
        The new weight, and its mask (True where kept).
    """
    xp = array_namespace(weight, gram)
    found = removals(weight, gram, pattern)
    mask = xp.asarray(mask_at(found, sparsity, pattern))
    return refit(weight, gram, mask), mask


def mask_at(found: Removals, sparsity: float, pattern: Pattern) -> NDArray[np.bool_]:
    """Return the mask of a share of zeros over all rows together; N:M has its own."""
    rows, steps = found.order.shape
    if pattern.group:
        return found.mask(np.full(rows, steps), pattern)
    total = rows * found.blocks
    counts = allocate(list(found.errors), total - kept_count(total, sparsity))
    return found.mask(counts, pattern)
