"""How many weights each row or layer loses, from curves of what losing them costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def allocate(curves: Sequence[Floats], removed: int) -> NDArray[np.int64]:
    """Return how much to remove of each part so that the costs add up to the least.

    Curves are replaced by their lower convex hulls, of which the cheapest steps are taken; so the result is
    optimal wherever `removed` ends at a corner of a hull, and one step of one curve away from it elsewhere.
    (Greedy over rows as in Frantar, Singh & Alistarh 2022, "Optimal brain compression", algorithm 2, which
    is optimal for convex curves; hulls make it right for the others.)

    Args:
        curves: for each part the cost of removing 0, 1, 2, ... of it, `[size + 1]` each, finite.
        removed: in total, between 0 and the sum of the sizes.

    Returns:
        `[parts]`, the sum is `removed`.
    """
    steps = [_steps(curve) for curve in curves]
    owner = np.repeat(np.arange(len(steps)), [len(step) for step in steps])
    # Ties go to one curve after the other, so that at most one is left between corners.
    order = np.lexsort((owner, np.concatenate([*steps, np.zeros(0)])))
    counts: NDArray[np.int64] = np.bincount(owner[order[:removed]], minlength=len(steps)).astype(np.int64)
    return counts


def _steps(curve: Floats) -> Floats:
    """Return the steps of the largest convex function that nowhere lies above a curve on 0, 1, 2, ...

    Equal to the bit between two corners.
    """
    corners: list[int] = []
    for i in range(len(curve)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (curve[b] - curve[a]) * (i - b) < (curve[i] - curve[b]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    lengths = np.diff(corners)
    return np.repeat(np.diff(curve[corners]) / lengths, lengths)


def joined(curves: Sequence[Floats]) -> Floats:
    """Return the least cost of removing 0, 1, 2, ... of several parts together (on their hulls)."""
    steps = np.sort(np.concatenate([_steps(curve) for curve in curves]))
    return np.concatenate([[sum(float(curve[0]) for curve in curves)], steps]).cumsum()
