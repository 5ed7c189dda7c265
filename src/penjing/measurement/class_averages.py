"""Recall, precision and F1 of two models, averaged over classes: bounds that hold for classes of any size.

The drop of recall is a sum over examples of known weights, given how many examples each class has. Those of
precision and F1 are ratios. For a class k, with TP, P and S the indicators that an example is a true
positive, is predicted as k, is of class k, and M the metric of the candidate,

    M(baseline) - M(candidate) = E[t (TP_b - TP_c) - M (P_b - P_c)] / E[B],

with t = 1 and B = P_b for precision, t = 2 and B = S + P_b for F1. So the drop is the mean of a weighted sum
over the examples whose prediction changed, up to the quantities M, E[B] and, for the average by support,
E[S]. These get intervals that hold together (Bonferroni) but for a share of the error rate, and every changed
example is weighed as badly as they allow (maximising over nuisance parameters within a confidence set: Berger
and Boos, "P values maximized over a confidence set for the nuisance parameter", JASA 89, 1994). The sum is
then bounded by betting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.betting import Bets, stakes_below
from penjing.arrays.statistics import Interval, clopper_pearson
from penjing.measurement.paired import LEVEL, Known, PairedSum, enough, once, reach

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METHOD = "betting on changed predictions, worst case over what the classes' {kind}s rest on"
OCTAVES_BELOW = 4
"""Octaves of stakes below what changes of weight 1 need, for classes in which one change weighs more."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What two models predict on the same examples.

    Attributes:
        before, after, targets: `[n]` class indices of the baseline, of the candidate and of the data.
        classes: how many there are, seen or not.
        units: `[n]`, the number of the group that each example is in; None where each is alone.
    """

    before: Ints
    after: Ints
    targets: Ints
    classes: int
    units: Ints | None = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.targets)

    @cached_property
    def sizes(self) -> Floats:
        """`[units]`, the examples in each."""
        return self.summed(np.ones(self.n))

    def summed(self, values: Array) -> Floats:
        """Return the sums over the examples of each unit, `[units]`."""
        return summed(values, self.units)

    def swapped(self) -> Labels:
        """Return the same with baseline and candidate exchanged."""
        return Labels(self.after, self.before, self.targets, self.classes, self.units)


def summed(values: Array, units: Ints | None) -> Floats:
    """Return the sums of values `[n]` over each unit; the values themselves where examples are units."""
    return np.asarray(values if units is None else np.bincount(units, values), np.float64)


def recall_drop(labels: Labels) -> PairedSum:
    """Return the drop of recall, averaged over classes, given the number of examples of each class."""
    counts = np.bincount(labels.targets, minlength=labels.classes)
    weights = 1 / (labels.classes * counts[labels.targets])
    right = [(predictions == labels.targets).astype(float) for predictions in (labels.before, labels.after)]
    return PairedSum(
        losses=labels.summed(weights * (right[0] - right[1])),
        largest=labels.summed(weights),
        n=labels.n,
        method="betting on changed predictions, weighed by class",
    )


@dataclass(frozen=True, eq=False)
class PairedClasses:
    """The drop of precision or F1, averaged over classes or by their share of the examples.

    Attributes:
        kind: `precision` or `f1`.
        weighted: whether classes count by their share, else all alike.
        value: the drop that was seen.
    """

    labels: Labels
    kind: str
    weighted: bool
    value: float
    no_bound: str = ""
    _known: Known = field(default_factory=dict, init=False, repr=False)

    @property
    def method(self) -> str:
        """Name the test in words."""
        return METHOD.format(kind="F1" if self.kind == "f1" else self.kind)

    def bounds(self, confidence: float) -> Interval:
        """See `Paired`."""
        return once(self._known, confidence, self._bounds)

    def _bounds(self, confidence: float) -> Interval:
        alpha = 1 - confidence
        low, high = (
            self._bets(side, LEVEL * alpha).upper((1 - LEVEL) * alpha)
            for side in (self.labels.swapped(), self.labels)
        )
        return Interval(self.value, max(min(-low, self.value), -1.0), min(max(high, self.value), 1.0))

    def p_value(self, max_drop: float, alpha: float) -> float:
        """See `Paired`."""
        return min(1.0, self._bets(self.labels, LEVEL * alpha).p_value(max_drop) + LEVEL * alpha)

    def smallest(self, confidence: float) -> float:
        """See `Paired`."""
        return reach(self.bounds(confidence), self._bets(self.labels, LEVEL * (1 - confidence)).losses)

    def needed(self, max_drop: float, confidence: float) -> int | None:
        """See `Paired`."""
        losses = self._bets(self.labels, LEVEL * (1 - confidence)).losses
        return enough(self.bounds(confidence), losses, self.labels.n, max_drop)

    def _bets(self, labels: Labels, level: float) -> Bets:
        """Return bets on the worst that each example adds to the drop, within intervals wrong at a level."""
        weight, metric = _intervals(labels, self.kind, self.weighted, level)
        stakes = _stakes(labels)
        if not np.isfinite(weight).all():
            return Bets(np.zeros(len(labels.sizes)), stakes[:0], len(stakes))
        own = 2.0 if self.kind == "f1" else 1.0
        moved = labels.before != labels.after
        losses = np.zeros(labels.n)
        a, b, y = labels.before[moved], labels.after[moved], labels.targets[moved]
        losses[moved] = _most(weight[:, a], own * (a == y) - metric[0][a])
        losses[moved] += _most(weight[:, b], metric[1][b] - own * (b == y))
        largest = (weight[1] * (own - metric[0])).max() + (weight[1] * metric[1]).max()
        placed = stakes[stakes * largest * labels.sizes.max() <= labels.n]
        return Bets(labels.summed(losses) / labels.n, placed, len(stakes) - len(placed))


def _most(weight: Floats, signed: Floats) -> Floats:
    """Return the largest product of a number and a weight between bounds `[2, n]`."""
    return np.asarray(np.where(signed > 0, weight[1], weight[0]) * signed)


def _stakes(labels: Labels) -> Floats:
    """Return stakes that were chosen without a look at the predictions: from weight 4 to weights of many."""
    even = stakes_below(labels.sizes / labels.n)
    return np.concatenate([even, even[-1] / 2.0 ** np.arange(1, OCTAVES_BELOW + 1)])


def _intervals(labels: Labels, kind: str, weighted: bool, level: float) -> tuple[Floats, Floats]:
    """Return joint bounds `[2, classes]` of the classes' weights and of the candidate's metric."""
    each = level / (6 * labels.classes)
    rows = []
    for k in range(labels.classes):
        support, before, after = (x == k for x in (labels.targets, labels.before, labels.after))
        hits, whole = support & after, support | after if kind == "f1" else after
        rows.append(
            [_share(labels, x, each) for x in (support, before)] + [_ratio(labels, hits, whole, each)]
        )
    s, p, ratio = np.array(rows).transpose(1, 2, 0)
    base = s + p if kind == "f1" else p
    above = s if weighted else np.full_like(s, 1 / labels.classes)
    with np.errstate(divide="ignore"):
        weight = np.stack([above[0] / base[1], above[1] / base[0]])
    if weighted and kind == "f1":
        weight = np.minimum(weight, 1.0)
    return weight, 2 * ratio / (1 + ratio) if kind == "f1" else ratio


def _share(labels: Labels, found: NDArray[np.bool_], level: float) -> tuple[float, float]:
    """Return bounds of the share of examples that have a property `[n]`, each wrong at a level."""
    if labels.units is None:
        return clopper_pearson(int(found.sum()), labels.n, 2 * level)
    losses, stakes = labels.summed(found) / labels.n, stakes_below(labels.sizes / labels.n)
    low, high = (Bets(sign * losses, stakes).upper(level) for sign in (-1, 1))
    return max(0.0, -low), min(1.0, high)


def _ratio(
    labels: Labels, part: NDArray[np.bool_], whole: NDArray[np.bool_], level: float
) -> tuple[float, float]:
    """Return bounds of the share of a part among the examples of a whole, each wrong at a level."""
    count = int(whole.sum())
    if labels.units is None:
        return clopper_pearson(int(part.sum()), count, 2 * level) if count else (0.0, 1.0)
    parts, wholes = labels.summed(part) / labels.n, labels.summed(whole) / labels.n
    stakes = stakes_below(labels.sizes / labels.n)

    def end(sign: int) -> float:
        """Bisect for the share beyond which the part is too small, or before which it is too large."""
        low, high = 0.0, 1.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            beyond = Bets(sign * (parts - middle * wholes), stakes).p_value(0.0) <= level
            low, high = (low, middle) if beyond == (sign > 0) else (middle, high)
        return high if sign > 0 else low

    return end(-1), end(1)


def absent(targets: Ints, classes: int) -> list[int]:
    """Return the classes that no example is of."""
    return np.flatnonzero(np.bincount(targets, minlength=classes) == 0).tolist()


def weighs_alike(name: str) -> bool:
    """Tell whether an average over classes is nothing but accuracy.

    >>> weighs_alike("f1_micro"), weighs_alike("recall_weighted"), weighs_alike("f1_macro")
    (True, True, False)
    """
    return name.endswith("_micro") or name == "recall_weighted"
