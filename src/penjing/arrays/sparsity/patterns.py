"""Which zeros are allowed: patterns as data, and the masks of highest score that keep to them.

Functions take NumPy arrays or those of any library of the Python array API standard (PyTorch's among them),
and return the same kind. A weight `[out, in, *kernel]` is seen as the matrix `[out, in * kernel]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

Array = Any
"""An array of NumPy or of any library of the array API standard."""

Scope = Literal["layer", "row"]
"""Over what the share of zeros holds: the whole matrix, or each row (of blocks) by itself."""

_N_OF_M = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")
_BLOCK = re.compile(r"block:([1-9]\d{0,3})x([1-9]\d{0,3})")


@dataclass(frozen=True)
class Pattern:
    """Zeros come in blocks of `rows` by `columns`; with `group`, `kept` of every `group` inputs stay.

    `Pattern()` is unstructured sparsity.
    """

    rows: int = 1
    columns: int = 1
    kept: int = 0
    group: int = 0

    @property
    def sparsity(self) -> float | None:
        """The share of zeros where the pattern itself fixes it (N:M), else None."""
        return 1 - self.kept / self.group if self.group else None

    def misfit(self, shape: Sequence[int], groups: int = 1) -> str:
        """Say why a weight `[out, in, *kernel]` cannot have this pattern; empty where it can.

        Args:
            shape: of the weight.
            groups: of the convolution; a block does not reach from one group into the next.
        """
        out, columns = shape[0] // groups, math.prod(shape[1:])
        if self.group and shape[1] % self.group:
            return f"{shape[1]} inputs are no multiple of {self.group}"
        if out % self.rows:
            return f"{out} outputs are no multiple of {self.rows}"
        if columns % self.columns:
            return f"{columns} columns are no multiple of {self.columns}"
        return ""

    def column_order(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """Return the columns of the matrix in the order in which groups of N:M are neighbours.

        N:M counts along the input axis, at one position of the kernel, as sparse tensor cores do.

        Returns:
            `[in * kernel]`; all columns as they are for other patterns.
        """
        order = np.arange(math.prod(shape[1:]))
        return order.reshape(shape[1], -1).T.reshape(-1) if self.group else order


def pattern_of(text: str) -> Pattern:
    """Read a pattern: `unstructured`, `N:M` (N of every M inputs stay) or `block:RxC`.

    Raises:
        ValueError: it is none of these, or N is not below M.

    >>> pattern_of("2:4"), pattern_of("block:16x1")
    (Pattern(rows=1, columns=1, kept=2, group=4), Pattern(rows=16, columns=1, kept=0, group=0))
    """
    if text == "unstructured":
        return Pattern()
    if (found := _BLOCK.fullmatch(text)) is not None:
        return Pattern(int(found[1]), int(found[2]))
    found = _N_OF_M.fullmatch(text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError("must be a pattern; give unstructured, N:M with N below M such as 2:4, or block:RxC")
    return Pattern(kept=int(found[1]), group=int(found[2]))


def kept_count(size: int, sparsity: float) -> int:
    """Return how many of `size` stay at a share of zeros: at least one, the nearest number otherwise.

    >>> kept_count(10, 0.75), kept_count(10, 0.999)
    (2, 1)
    """
    return max(1, size - math.floor(size * sparsity + 0.5))


def mask_of(score: Array, sparsity: float, pattern: Pattern, scope: Scope = "layer") -> Array:
    """Return where the entries (or blocks) of highest score stay.

    Args:
        score: `[rows, columns]`, finite, columns in the pattern's `column_order`; a block has the sum.
        sparsity: share of zeros, in [0, 1); N:M has its own.
        pattern: the matrix fits it (`misfit`).
        scope: see `Scope`.

    Returns:
        Booleans `[rows, columns]`, True where kept. Ties go to the lower index.
    """
    tiles = block_sums(score, pattern)
    if pattern.group:
        shape = tiles.shape
        chosen = top(tiles.reshape((-1, pattern.group)), pattern.kept).reshape(shape)
    elif scope == "row":
        chosen = top(tiles, kept_count(tiles.shape[1], sparsity))
    else:
        count = kept_count(math.prod(tiles.shape), sparsity)
        chosen = top(tiles.reshape((1, -1)), count).reshape(tiles.shape)
    return expand_blocks(chosen, pattern)


def block_sums(values: Array, pattern: Pattern) -> Array:
    """Return the sum over each block: `[rows / pattern.rows, columns / pattern.columns]`."""
    xp = array_namespace(values)
    if pattern.rows == pattern.columns == 1:
        return values
    rows, columns = values.shape
    split = (rows // pattern.rows, pattern.rows, columns // pattern.columns, pattern.columns)
    return xp.sum(values.reshape(split), axis=(1, 3))


def expand_blocks(tiles: Array, pattern: Pattern) -> Array:
    """Return the matrix in which every entry has its block's value."""
    xp = array_namespace(tiles)
    if pattern.rows == pattern.columns == 1:
        return tiles
    return xp.repeat(xp.repeat(tiles, pattern.rows, axis=0), pattern.columns, axis=1)


def top(score: Array, count: int) -> Array:
    """Return where the `count` highest values of each row are, exactly; ties go to the lower index."""
    xp = array_namespace(score)
    order = xp.argsort(-score, axis=1, stable=True)
    rank = xp.argsort(order, axis=1, stable=True)
    return rank < count


def global_masks(
    scores: Mapping[str, NDArray[np.floating]], sparsity: float, pattern: Pattern, floor: float
) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of the highest scores over all matrices together, one threshold for all.

    Args:
        scores: by name `[rows, columns]`; a block counts with its mean.
        sparsity: share of zeros among all entries together (in whole blocks).
        pattern: unstructured or blocks; N:M leaves nothing to choose between matrices.
        floor: each matrix keeps at least this share of its blocks (at least one), those of highest score.
    """
    size = pattern.rows * pattern.columns
    tiles = {name: np.asarray(block_sums(score, pattern)) / size for name, score in scores.items()}
    safe = {name: top(t.reshape(1, -1), max(1, math.ceil(floor * t.size))) for name, t in tiles.items()}
    flat = np.concatenate([np.where(safe[n], np.inf, t.reshape(1, -1)) for n, t in tiles.items()], axis=1)
    chosen = top(flat, max(kept_count(flat.size, sparsity), sum(int(s.sum()) for s in safe.values())))
    ends = np.cumsum([t.size for t in tiles.values()])[:-1]
    parts = np.split(chosen[0], ends)
    return {
        name: expand_blocks(part.reshape(tiles[name].shape), pattern)
        for name, part in zip(tiles, parts, strict=True)
    }
