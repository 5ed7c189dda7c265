"""What several runs of one recipe say together: mean, spread, intervals, and differences between recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.statistics import Interval
from penjing.core.errors import Refused


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean with Student's two-sided interval; runs are a sample of all that seeds could give.

    Raises:
        Refused: fewer than two values.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        raise Refused("an interval needs at least two runs", value=n, place="mean_interval")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def disagreement(predictions: Sequence[NDArray[np.int64]]) -> float:
    """Return the share of examples on which two runs predict differently, a mean over all pairs of runs.

    Args:
        predictions: classes `[n]` of each run.
    """
    pairs = [
        float(np.mean(predictions[i] != predictions[j]))
        for i in range(len(predictions))
        for j in range(i + 1, len(predictions))
    ]
    return float(np.mean(pairs)) if pairs else 0.0


def difference_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Return second minus first, run by run of the same seed, with Student's two-sided interval.

    Raises:
        Refused: fewer than two runs, or another number of them on each side.
    """
    if len(first) != len(second):
        raise Refused("both recipes ran with the same seeds", value=f"{len(first)} and {len(second)} runs",
                      place="difference_interval")  # fmt: skip
    return mean_interval([b - a for a, b in zip(first, second, strict=True)], confidence)
