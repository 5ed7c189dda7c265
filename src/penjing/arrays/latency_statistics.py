"""Statistics of times that were taken in rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.spread import mean_interval
from penjing.arrays.statistics import Interval
from penjing.core.errors import Refused

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]


def rounds_interval(
    samples: Sequence[Sequence[float]],
    statistic: Statistic,
    confidence: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
) -> Interval:
    """Return a statistic of all times with a percentile bootstrap interval that resamples whole rounds.

    Times within a round share the state of the machine, so that they are no independent observations; the
    rounds are (the cluster bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 3.8).

    Args:
        samples: the times of each round, all positive and finite.
        statistic: maps a flat array of times to a number.
        confidence: of the two-sided interval.
        resamples: draws of the bootstrap.
        seed: of the draws; the same samples give the same interval.

    >>> rounds_interval([[1.0, 3.0], [2.0, 2.0]], percentile(50)).value
    2.0

    Raises:
        Refused: no rounds, an empty round, or a time that is not positive and finite.
    """
    rounds = check_rounds(samples)
    rng = np.random.default_rng(seed)
    draws = np.array(
        [
            statistic(np.concatenate([rounds[i] for i in rng.integers(len(rounds), size=len(rounds))]))
            for _ in range(resamples)
        ]
    )
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = statistic(np.concatenate(rounds))
    # A skewed statistic can leave its own percentile interval; the interval always holds the value.
    return Interval(value, min(float(low), value), max(float(high), value))


def processes_interval(values: Sequence[float], noise: float = 0.0, confidence: float = 0.95) -> Interval:
    """Return the geometric mean of one value for each of several processes, with an interval for others.

    Two processes of one file differ by where their memory came to lie, often by a percent and more, however
    long each is timed. So Student's interval is taken over processes, of the logarithms, and widened by the
    noise of the machine; the two are independent and add as squares.

    Args:
        values: a time of each process, or a ratio of each pair of processes; positive.
        noise: relative difference of two processes of one file, see `processes_noise`.
        confidence: of the two-sided interval.

    >>> found = processes_interval([1.0, 1.0, 1.0], noise=0.01)
    >>> round(found.low, 4), round(found.high, 4)
    (0.99, 1.0101)

    Raises:
        Refused: fewer than two values, or one that is not positive and finite.
    """
    _check_positive([np.asarray(values, dtype=np.float64)])
    mean, _, high = mean_interval([math.log(value) for value in values], confidence)
    half = math.hypot(high - mean, noise)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def processes_noise(logarithms: Sequence[float]) -> float:
    """Return by how much two processes of one file differ: sqrt(2) standard deviations over some processes.

    Args:
        logarithms: of the time of each process, up to a constant; at least two.

    >>> round(processes_noise([0.0, 0.01]), 4)
    0.01
    """
    return math.sqrt(2) * float(np.std(logarithms, ddof=1))


def widened_interval(interval: Interval, noise: float, n: int, confidence: float = 0.95) -> Interval:
    """Return the interval of a time, or a ratio, of one process alone, widened by what processes differ by.

    Args:
        interval: as the rounds of the process tell it; positive.
        noise: relative difference of two processes.
        n: processes that the noise was found from, at least 2; Student's quantile is of n - 1.

    >>> found = widened_interval(Interval(1.0, 1.0, 1.0), noise=0.01, n=3)
    >>> round(found.low, 4), round(found.high, 4)
    (0.9579, 1.044)
    """
    from scipy.special import stdtrit

    more = float(stdtrit(n - 1, (1 + confidence) / 2)) * noise
    down, up = math.log(interval.value / interval.low), math.log(interval.high / interval.value)
    return Interval(
        interval.value,
        interval.value * math.exp(-math.hypot(down, more)),
        interval.value * math.exp(math.hypot(up, more)),
    )


def percentile(share: float) -> Statistic:
    """Return the function that takes the percentile `share` (0 to 100) of times.

    >>> percentile(50)(np.array([1.0, 2.0, 9.0]))
    2.0
    """
    return lambda times: float(np.percentile(times, share))


def round_medians(samples: Sequence[Sequence[float]]) -> Floats:
    """Return the median of each round."""
    return np.array([np.median(times) for times in check_rounds(samples)])


def check_rounds(samples: Sequence[Sequence[float]]) -> list[Floats]:
    """Return the rounds as arrays.

    Raises:
        Refused: no rounds, an empty round, or a time that is not positive and finite.
    """
    rounds = [np.asarray(times, dtype=np.float64) for times in samples]
    if not rounds or any(times.size == 0 for times in rounds):
        raise Refused(
            "every round must have a time",
            value=[len(t) for t in rounds],
            place="latency",
            fix="time at least one call in each round",
        )
    _check_positive(rounds)
    return rounds


def _check_positive(rounds: list[Floats]) -> None:
    wrong: Any = next((t for times in rounds for t in times if not (np.isfinite(t) and t > 0)), None)
    if wrong is not None:
        raise Refused(
            "times must be positive and finite",
            value=wrong,
            place="latency",
            fix="take them with a monotonic clock",
        )
