"""Two models on the same examples: the drop of the metric and a bound on it that is valid for the metric.

Whatever the metric, the hypothesis is "the true drop is `max_drop` or more", and a class here says what
bounds it. Where examples come in groups (patients, users, documents) the groups are what is independent:
contributions are summed within each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.betting import Bets, stakes_below
from penjing.arrays.bootstrap import REPLICATES, Resampled
from penjing.arrays.statistics import (
    Interval,
    drop_bounds,
    needed_examples,
    noninferiority_p_value,
    smallest_certifiable_drop,
)
from penjing.measurement.example_values import Average

Array = NDArray[Any]
Floats = NDArray[np.float64]
POWER = 0.8
Known = dict[float, Interval]
"""Bounds by their confidence."""

LEVEL = 0.1
"""Share of the error rate given to the level that the drop starts from, where the metric is no plain mean."""

_NORMAL = NormalDist()


class Paired(Protocol):
    """Candidate and baseline on the same examples."""

    @property
    def method(self) -> str:
        """Name the test in words."""

    @property
    def no_bound(self) -> str:
        """Say why no bound on the metric is known and what would give one; empty where one is."""

    def bounds(self, confidence: float) -> Interval:
        """Return the drop with its lower and upper bound, each one-sided at the confidence."""

    def p_value(self, max_drop: float, alpha: float) -> float:
        """Return the p-value of "the true drop is max_drop or more"."""

    def smallest(self, confidence: float) -> float:
        """Return the smallest drop that as many examples certify with 80% power, were the true drop 0."""

    def needed(self, max_drop: float, confidence: float) -> int | None:
        """Return how many examples would certify max_drop with 80% power; None where none would."""


@dataclass(frozen=True)
class PairedProportions:
    """Right or wrong for every example: the exact test."""

    lost: int
    gained: int
    n: int
    method: str = "exact paired non-inferiority test, ordered by Tango's score"
    no_bound: str = ""

    def bounds(self, confidence: float) -> Interval:
        """See `Paired`."""
        return drop_bounds(self.lost, self.gained, self.n, confidence)

    def p_value(self, max_drop: float, alpha: float) -> float:
        """See `Paired`."""
        return noninferiority_p_value(self.lost, self.gained, self.n, max_drop, alpha)

    def smallest(self, confidence: float) -> float:
        """See `Paired`."""
        return smallest_certifiable_drop(self.n, (self.lost + self.gained) / self.n, confidence, POWER)

    def needed(self, max_drop: float, confidence: float) -> int | None:
        """See `Paired`."""
        drop = max(0.0, (self.lost - self.gained) / self.n)
        flips = (self.lost + self.gained) / self.n
        return needed_examples(max_drop, flips, confidence, POWER, drop) if drop < max_drop else None


@dataclass(frozen=True, eq=False)
class PairedSum:
    """A drop that is the sum of independent contributions of known range: bounded by betting.

    Attributes:
        losses: `[units]`, what each example, or each group of examples, adds to the drop.
        largest: `[units]`, above 0: the most that each can add or take.
        n: examples.
    """

    losses: Floats
    largest: Floats
    n: int
    method: str
    no_bound: str = ""
    _known: Known = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def value(self) -> float:
        """The drop that was seen."""
        return float(self.losses.sum())

    def bounds(self, confidence: float) -> Interval:
        """See `Paired`."""
        return once(self._known, confidence, self._bounds)

    def _bounds(self, confidence: float) -> Interval:
        most = float(self.largest.sum())
        low, high = (self._bets(sign).upper(1 - confidence) for sign in (-1, 1))
        return Interval(self.value, max(-low, -most), min(high, most))

    def p_value(self, max_drop: float, alpha: float) -> float:
        """See `Paired`."""
        return self._bets(1).p_value(max_drop)

    def smallest(self, confidence: float) -> float:
        """See `Paired`."""
        return reach(self.bounds(confidence), self.losses)

    def needed(self, max_drop: float, confidence: float) -> int | None:
        """See `Paired`."""
        return enough(self.bounds(confidence), self.losses, self.n, max_drop)

    def _bets(self, sign: int) -> Bets:
        return Bets(sign * self.losses, stakes_below(self.largest))


@dataclass(frozen=True, eq=False)
class PairedAverage:
    """A metric that is no plain mean but one taken back: RMSE from squares, perplexity from logarithms.

    What is averaged has a bound like any mean. How far the metric moves with it depends on where it starts,
    so a share of the error rate goes to an interval of the baseline's own average.

    Attributes:
        averages: the drop of what is averaged.
        before: `[units]`, what the baseline adds to its average above the least that it can be.
        ends: the range of what is averaged.
        average: how the metric comes of it.
        rises: whether the metric is to be minimised, so that it rises where it gets worse.
    """

    averages: PairedSum
    before: Floats
    ends: tuple[float, float]
    average: Average
    rises: bool
    no_bound: str = ""
    _known: Known = field(default_factory=dict, init=False, repr=False)

    @property
    def method(self) -> str:
        """Name the test in words."""
        return self.averages.method

    def bounds(self, confidence: float) -> Interval:
        """See `Paired`."""
        return once(self._known, confidence, self._bounds)

    def _bounds(self, confidence: float) -> Interval:
        alpha = 1 - confidence
        change = self.averages.bounds(1 - (1 - LEVEL) * alpha)
        starts = self._starts(LEVEL * alpha / 2)
        value = self._moved(self.ends[0] + float(self.before.sum()), self.averages.value)
        low = min(self._moved(start, change.low) for start in self._turns(starts, change.low))
        high = max(self._moved(start, change.high) for start in self._turns(starts, change.high))
        return Interval(value, min(low, value), max(high, value))

    def p_value(self, max_drop: float, alpha: float) -> float:
        """See `Paired`."""
        return p_of_bound(lambda level: self.bounds(1 - level).high, max_drop)

    def smallest(self, confidence: float) -> float:
        """See `Paired`."""
        bounds = self.bounds(confidence)
        return reach(bounds, self._slope(bounds) * self.averages.losses)

    def needed(self, max_drop: float, confidence: float) -> int | None:
        """See `Paired`."""
        bounds = self.bounds(confidence)
        return enough(bounds, self._slope(bounds) * self.averages.losses, self.averages.n, max_drop)

    def _starts(self, alpha: float) -> tuple[float, float]:
        """Return bounds of the baseline's own average, together wrong with at most twice the level."""
        low, high = self.ends
        stakes = stakes_below(self.averages.largest)
        above, below = (Bets(sign * self.before, stakes).upper(alpha) for sign in (1, -1))
        return max(low, low - below), min(high, low + above)

    def _turns(self, starts: tuple[float, float], change: float) -> list[float]:
        """Return the starts between which the drop only rises or only falls, if it changes by so much."""
        ends = (end - change if self.rises else end + change for end in self.ends)
        return [*starts, *(min(max(end, starts[0]), starts[1]) for end in ends)]

    def _moved(self, start: float, change: float) -> float:
        """Return the drop of the metric where the baseline's average is at a start, and gets worse."""
        end = start + change if self.rises else start - change
        moved = self.average.back(min(max(end, self.ends[0]), self.ends[1])) - self.average.back(start)
        return moved if self.rises else -moved

    def _slope(self, bounds: Interval) -> float:
        averaged = self.averages.bounds(0.95)
        return (bounds.high - bounds.value) / max(averaged.high - averaged.value, 1e-300)


@dataclass(frozen=True)
class PairedBootstrap:
    """A metric of which no bound is known: an interval to look at, and nothing that could be certified."""

    resampled: Resampled
    n: int
    no_bound: str
    method: str = f"paired bootstrap (BCa, {REPLICATES:,} samples), an indication and no bound"

    def bounds(self, confidence: float) -> Interval:
        """See `Paired`."""
        low, high = self.resampled.quantile(1 - confidence), self.resampled.quantile(confidence)
        value = self.resampled.value
        return Interval(value, min(low, value), max(high, value))

    def p_value(self, max_drop: float, alpha: float) -> float:
        """See `Paired`."""
        return 1.0

    def smallest(self, confidence: float) -> float:
        """See `Paired`: infinite, as no number of examples certifies what has no bound."""
        return math.inf

    def needed(self, max_drop: float, confidence: float) -> int | None:
        """See `Paired`."""
        return None


def once(known: Known, confidence: float, bounds: Callable[[float], Interval]) -> Interval:
    """Return bounds at a confidence, taken once."""
    if confidence not in known:
        known[confidence] = bounds(confidence)
    return known[confidence]


def reach(bounds: Interval, losses: Floats) -> float:
    """Return the drop that is certified with 80% power where the true one is 0: about, by the normal law."""
    return bounds.high - bounds.value + _NORMAL.inv_cdf(POWER) * _error(losses)


def enough(bounds: Interval, losses: Floats, n: int, max_drop: float) -> int | None:
    """Return about how many examples certify a drop with 80% power; None where the seen one is above it."""
    room = max_drop - max(0.0, bounds.value)
    return math.ceil(n * (reach(bounds, losses) / room) ** 2) if room > 0 else None


def p_of_bound(upper: Callable[[float], float], max_drop: float) -> float:
    """Return the smallest level at which an upper bound, a function of the level, is at most a drop."""
    low, high = 1e-6, 1.0
    if upper(low) <= max_drop:
        return low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if upper(middle) <= max_drop else (middle, high)
    return high


def _error(losses: Floats) -> float:
    """Return the standard error of a sum of independent contributions."""
    return float(np.sqrt(((losses - losses.mean()) ** 2).sum()))
