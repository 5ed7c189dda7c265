"""What several runs of one recipe say together: mean, spread, intervals, and differences between recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
        raise Refused(
            "needs at least two runs", value=n, place="mean_interval", fix="run the recipe with another seed"
        )
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def disagreement(predictions: Sequence[NDArray[Any]]) -> float:
    """Return the share of examples on which two runs predict differently, a mean over all pairs of runs.

    Args:
        predictions: classes `[n]` of each run, or right and wrong.
    """
    pairs = [
        float(np.mean(predictions[i] != predictions[j]))
        for i in range(len(predictions))
        for j in range(i + 1, len(predictions))
    ]
    return float(np.mean(pairs)) if pairs else 0.0


def sampling_spread(right: Sequence[NDArray[np.bool_]]) -> float:
    """Return the spread over runs that the test examples alone would make, were all runs equally good.

    Two such runs differ by chance only on the examples that one gets right and the other wrong, so the
    expected standard deviation over runs is the root of the share of these, a mean over all pairs, over 2n.
    Long training comes near it: what seeds add is small (Jordan 2023, arXiv 2304.01910).

    Args:
        right: of each of at least two runs, whether each test example is recognised, `[n]`.

    >>> round(sampling_spread([np.array([True] * 98 + [False] * 2), np.array([False] * 2 + [True] * 98)]), 4)
    0.0141
    """
    return math.sqrt(disagreement(right) / (2 * len(right[0])))


def equal_quality_p_value(spread: float, sampling: float, runs: int) -> float:
    """Return how likely runs that are all equally good spread so far or farther.

    The squared ratio of the spread to `sampling_spread`, times runs - 1, is Cochran's Q (Biometrika 37,
    1950), chi-squared with runs - 1 degrees of freedom for many test examples.

    Args:
        spread: standard deviation over the runs, at least 0.
        sampling: what it would be from test examples alone, at least 0.
        runs: how many, at least 2.

    >>> round(equal_quality_p_value(0.02, 0.01, 5), 4)
    0.003
    """
    from scipy.special import chdtrc

    if spread == 0:
        return 1.0
    return float(chdtrc(runs - 1, (runs - 1) * (spread / sampling) ** 2)) if sampling else 0.0


def difference_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Return second minus first, run by run of the same seed, with Student's two-sided interval.

    Raises:
        Refused: fewer than two runs, or another number of them on each side.
    """
    if len(first) != len(second):
        raise Refused(
            "both recipes must have run with the same seeds",
            value=f"{len(first)} and {len(second)} runs",
            place="difference_interval",
            fix="pair the runs by seed, and leave those of one recipe out",
        )
    return mean_interval([b - a for a, b in zip(first, second, strict=True)], confidence)
