"""One option for each part of a whole: least cost within a budget, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_SLACK = 1e-9
"""Relative; a bound this little above the best known cost may be rounding, and rules nothing out."""


@dataclass(frozen=True)
class _States:
    """Choices for the first parts that no other choice beats in both weight and cost.

    Attributes:
        weights: rising.
        costs: falling.
        before: index of the state without the last part.
        options: what the last part was given.
    """

    weights: Counts
    costs: Floats
    before: Counts
    options: Counts


def choose_options(costs: Sequence[Floats], weights: Sequence[Counts], budget: int) -> Counts:
    """Return for each part the option such that the sum of costs is least and that of weights in the budget.

    The multiple-choice knapsack problem, solved to optimality by dynamic programming over the states that no
    other beats, less those that a bound rules out: the linear relaxation of what is left (Dyer, Riha & Walker
    1995, "A hybrid dynamic programming/branch-and-bound algorithm for the multiple-choice knapsack problem").
    There are never more states than different weights up to the budget; the bound leaves few of them where
    parts are many.

    Args:
        costs: for each part `[options]`, finite; may be negative.
        weights: for each part `[options]`, integers of any size from 0.
        budget: the most that the weights may add up to.

    Returns:
        `[parts]`, the index of an option in each. Optimal up to 1e-9 of the costs' scale.

    Raises:
        Refused: even the lightest options do not fit.

    >>> import numpy as np
    >>> gain = [np.array([5.0, 0.0]), np.array([3.0, 1.0])]
    >>> choose_options(gain, [np.array([1, 4]), np.array([1, 2])], 5).tolist()
    [1, 0]
    """
    least = sum(int(w.min()) for w in weights)
    if least > budget:
        raise Refused(
            "must hold the lightest option of every part",
            value=f"they weigh {least} of {budget}",
            place="budget",
            fix=f"allow at least {least}",
        )
    order = sorted(range(len(costs)), key=lambda part: -int(np.ptp(weights[part])))
    hulls = [_hull(costs[part], weights[part]) for part in order]
    scale = max((float(np.abs(c).max()) for c in costs), default=0.0) * max(len(costs), 1)
    stages: list[_States] = []
    now = _States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    best = np.inf
    for number, part in enumerate(order):
        rest = _Relaxed(hulls[number + 1 :])
        now = _extended(now, costs[part], weights[part], budget - rest.least)
        room = budget - now.weights
        best = min(best, float((now.costs + rest.reached(room)).min()))
        kept = now.costs + rest.bound(room) <= best + _SLACK * scale
        now = _States(now.weights[kept], now.costs[kept], now.before[kept], now.options[kept])
        stages.append(now)
    return _traced(stages, order)


def _extended(states: _States, costs: Floats, weights: Counts, limit: int) -> _States:
    """Return the states with one part more, those that are too heavy or beaten left out."""
    total = (states.weights[:, None] + weights.astype(np.int64)).ravel()
    spent = (states.costs[:, None] + costs).ravel()
    order = np.lexsort((spent, total))
    order = order[total[order] <= limit]
    lowest = np.minimum.accumulate(spent[order])
    better = np.append(True, lowest[1:] < lowest[:-1])
    order = order[better[: len(order)]]
    return _States(total[order], spent[order], *np.divmod(order, len(costs)))


def _traced(stages: Sequence[_States], order: Sequence[int]) -> Counts:
    chosen = np.zeros(len(order), np.int64)
    state = -1  # The last one costs least.
    for stage, part in zip(reversed(stages), reversed(order), strict=True):
        chosen[part], state = stage.options[state], int(stage.before[state])
    return chosen


def _hull(costs: Floats, weights: Counts) -> tuple[Counts, Floats]:
    """Return weights and costs at the corners of the lower convex hull, weights rising and costs falling."""
    corners: list[int] = []
    for i in np.lexsort((costs, weights)):
        if corners and costs[i] >= costs[corners[-1]]:
            continue
        while len(corners) > 1:
            a, b = corners[-2:]
            by_b = (costs[b] - costs[a]) * (weights[i] - weights[b])
            if by_b < (costs[i] - costs[b]) * (weights[b] - weights[a]):
                break
            corners.pop()
        corners.append(int(i))
    return weights[corners].astype(np.int64), costs[corners].astype(np.float64)


class _Relaxed:
    """What parts cost together where options may be mixed: a convex function of the room for them."""

    def __init__(self, hulls: Sequence[tuple[Counts, Floats]]) -> None:
        steps = [(np.diff(w), np.diff(c)) for w, c in hulls]
        lengths = np.concatenate([w for w, _ in steps] or [np.zeros(0, np.int64)])
        gains = np.concatenate([c for _, c in steps] or [np.zeros(0)])
        order = np.argsort(gains / np.maximum(lengths, 1), kind="stable")
        self.least = sum(int(w[0]) for w, _ in hulls)
        start = sum(float(c[0]) for _, c in hulls)
        self._room = self.least + np.append(0, lengths[order].cumsum())
        self._cost = start + np.append(0.0, gains[order].cumsum())

    def bound(self, room: Counts) -> Floats:
        """Return the least cost for each room, at least `least`; no true choice costs less."""
        found: Floats = np.interp(room, self._room, self._cost)
        return found

    def reached(self, room: Counts) -> Floats:
        """Return the cost of a true choice for each room: the best steps as far as whole ones fit."""
        found: Floats = self._cost[np.searchsorted(self._room, room, "right") - 1]
        return found
