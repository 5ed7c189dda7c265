"""Two models on the same examples: the drop of the metric, its bounds and the test that fits the metric."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.bootstrap import REPLICATES, Resampled, bootstrap
from penjing.arrays.statistics import (
    Interval,
    drop_bounds,
    needed_examples,
    noninferiority_p_value,
    smallest_certifiable_drop,
)
from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.measurement.quality import (
    checked_outputs,
    is_classification,
    maximized,
    metric_value,
    per_example,
    weighted_scores,
)

Array = NDArray[Any]
POWER = 0.8
PROBES = 32


class Paired(Protocol):
    """Candidate and baseline on the same examples."""

    @property
    def method(self) -> str:
        """Name the test in words."""

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


@dataclass(frozen=True)
class PairedBootstrap:
    """Any metric: BCa bounds, widened by what changes too rare to be seen here could do.

    A resample knows only the changes that occurred: two models without any would have a bound of 0 on any
    number of examples. Changes of a share 1 - alpha^(1/n) of the examples go unseen with probability alpha;
    `reach` is how far the metric moves per share of examples changed.
    """

    resampled: Resampled
    reach: float
    n: int
    method: str = f"paired bootstrap (BCa, {REPLICATES:,} samples), widened for changes too rare to be seen"

    def bounds(self, confidence: float) -> Interval:
        """See `Paired`."""
        unseen = self._unseen(confidence)
        low, high = self.resampled.quantile(1 - confidence), self.resampled.quantile(confidence)
        value = self.resampled.value
        return Interval(value, min(low, value) - unseen, max(high, value) + unseen)

    def p_value(self, max_drop: float, alpha: float) -> float:
        """See `Paired`."""
        low, high = 1 / (REPLICATES + 1), 1 - 1e-9
        if self.bounds(1 - low).high <= max_drop:
            return low
        while high - low > 1e-5:
            middle = (low + high) / 2
            low, high = (low, middle) if self.bounds(1 - middle).high <= max_drop else (middle, high)
        return high

    def smallest(self, confidence: float) -> float:
        """See `Paired`."""
        return self._factor(confidence) * self.resampled.deviation + self._unseen(confidence)

    def needed(self, max_drop: float, confidence: float) -> int | None:
        """See `Paired`."""
        room = max_drop - max(0.0, self.resampled.value)
        if room <= 0:
            return None
        wide, unseen = self._factor(confidence) * self.resampled.deviation, self._unseen(confidence)
        if wide == unseen == 0:
            return self.n
        root = 2 * room / (wide + float(np.sqrt(wide**2 + 4 * unseen * room)))
        return int(np.ceil(self.n / root**2))

    def _unseen(self, confidence: float) -> float:
        return float(self.reach * (1 - (1 - confidence) ** (1 / self.n)))

    def _factor(self, confidence: float) -> float:
        return NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(POWER)


def compare(task: Task, baseline: Array, candidate: Array, targets: Array, seed: int = 0) -> Paired:
    """Compare two models' outputs on the same examples by the test that fits the task's metric."""
    before, after = per_example(task, baseline, targets), per_example(task, candidate, targets)
    if before is not None and after is not None:
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
        return PairedProportions(lost, gained, len(targets))
    baseline, candidate = checked_outputs(baseline, targets), checked_outputs(candidate, targets)
    sign = 1.0 if maximized(task) else -1.0
    for outputs in (baseline, candidate):  # refuses what the resamples would only leave out
        metric_value(task, outputs, targets)

    def drop(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return sign * (
            _weighted(task, baseline, targets, weights) - _weighted(task, candidate, targets, weights)
        )

    reach = _reach(task, candidate, targets, seed) if is_classification(candidate, targets) else 0.0
    return PairedBootstrap(bootstrap(drop, len(targets), seed=seed), reach, len(targets))


def _weighted(
    task: Task, outputs: Array, targets: Array, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    if isinstance(task.metric, str):
        return weighted_scores(task.metric, outputs.argmax(axis=1), targets, weights)
    values = np.empty(len(weights))
    for i, row in enumerate(weights):
        index = np.repeat(np.arange(len(row)), row.astype(int))
        try:
            values[i] = metric_value(task, outputs[index], targets[index])
        except Refused:
            values[i] = np.nan
    return values


def _reach(task: Task, outputs: Array, targets: Array, seed: int) -> float:
    """Return the largest change of the metric, times n, when one example gets another class's outputs.

    Tried on examples of every class, rare ones first, since one error there moves a class average most.
    """
    rng = np.random.default_rng(seed)
    labels, counts = np.unique(targets, return_counts=True)
    value, largest = metric_value(task, outputs, targets), 0.0
    for label in labels[np.argsort(counts, kind="stable")][:PROBES]:
        others = np.flatnonzero(targets != label)
        if len(others) == 0:
            break
        right = np.flatnonzero((targets == label) & (outputs.argmax(axis=1) == label))
        own = right if len(right) else np.flatnonzero(targets == label)
        changed = outputs.copy()
        changed[rng.choice(own)] = outputs[rng.choice(others)]
        largest = max(largest, abs(metric_value(task, changed, targets) - value))
    return largest * len(targets)
