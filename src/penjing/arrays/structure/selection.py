"""Which units stay: widths that suit kernels, one ranking over groups, and the smallest cut that suffices."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def kept_width(size: int, ratio: float, blocks: int, round_to: int) -> int:
    """Return how many units stay when a share `ratio` is removed.

    The nearest multiple of `round_to` that all blocks can share equally, at least one such multiple, and
    all units where the group is no wider than that.

    >>> kept_width(64, 0.5, 1, 8), kept_width(64, 0.999, 1, 8), kept_width(6, 0.5, 1, 8)
    (32, 8, 6)
    >>> kept_width(12, 0.5, 4, 1)
    8
    """
    step = math.lcm(round_to, blocks)
    nearest = math.floor(size * (1 - ratio) / step + 0.5) * step
    return min(max(nearest, step), size)


def strongest(score: Floats, width: int, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the `width` units of highest score, sorted, equally many from every block.

    Args:
        score: shape `[size]`; ties go to the lower index.
        width: a multiple of the number of blocks.
        blocks: shape `[size]`, the block of every unit.
    """
    names = np.unique(blocks)
    best = np.argsort(-np.asarray(score, np.float64), kind="stable")
    kept = [best[blocks[best] == name][: width // len(names)] for name in names]
    return np.sort(np.concatenate(kept)).astype(np.int64)
