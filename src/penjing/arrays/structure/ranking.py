"""One order in which units go, within groups or across them, and the smallest cut that suffices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.structure.selection import Floats, kept_width, strongest
from penjing.core.backend import Group

Kept = dict[str, NDArray[np.int64]]
"""By group name: the units that stay, sorted."""

Selection = Literal["local", "global", "isomorphic"]
_BISECTIONS = 30


@dataclass(frozen=True)
class Bounds:
    """Widths that a group may have: multiples of `step` (or all units) from `low` to `high`."""

    step: int
    low: int
    high: int

    def width(self, group: Group, share: float) -> int:
        """Return the allowed width that comes nearest to removing a share of the units."""
        wanted = kept_width(group.size, share, len(np.unique(group.blocks)), self.step)
        return min(max(wanted, self.low), self.high)


def bounds(group: Group, round_to: int, floor: float, ceiling: float) -> Bounds:
    """Return the widths that a group may have.

    Args:
        group: a unit of several rows (a head) brings its rows along: the rows that stay are then a
            multiple of `round_to`.
        round_to: channels that stay are a multiple of this; a group that has no more stays whole.
        floor: least share of the units that stays.
        ceiling: largest share that stays; gives way to the floor and to one multiple.
    """
    rows = [np.count_nonzero(s.units >= 0) // group.size for s in group.slots if s.role == "out"]
    step = round_to // math.gcd(round_to, min(rows, default=1))
    whole = math.lcm(step, len(np.unique(group.blocks)))
    # A hair below, so that 0.3 * 10 is 3.
    low = min(max(math.ceil(floor * group.size / whole - 1e-9), 1) * whole, group.size)
    high = group.size if ceiling >= 1 else math.floor(ceiling * group.size / whole + 1e-9) * whole
    return Bounds(step, low, max(high, low))


def classes(
    groups: Sequence[Group], kinds: Mapping[str, str], selection: Selection
) -> tuple[tuple[Group, ...], ...]:
    """Divide groups into those whose units compete with each other.

    `local`: every group for itself. `global`: all together. `isomorphic`: groups of equal topology (Fang et
    al. 2024, "Isomorphic Pruning for Vision Models").

    Args:
        groups: all that may shrink.
        kinds: of layers, by name.
        selection: which of the three.
    """
    if selection == "local":
        return tuple((group,) for group in groups)
    if selection == "global":
        return (tuple(groups),) if groups else ()
    alike: dict[object, list[Group]] = {}
    for group in groups:
        alike.setdefault(topology(group, kinds), []).append(group)
    return tuple(tuple(members) for members in alike.values())


def topology(group: Group, kinds: Mapping[str, str]) -> tuple[object, ...]:
    """Return what two groups share if they are isomorphic: kinds of layers, tensors, axes and roles in order.

    Sizes and names do not count; which slots belong to one layer does.
    """
    number = {layer: i for i, layer in enumerate(dict.fromkeys(slot.layer for slot in group.slots))}
    slots = tuple((number[s.layer], kinds[s.layer], s.tensor, s.axis, s.role) for s in group.slots)
    return (group.kind, slots)


class Ranking:
    """The order in which units go, as a map from a level in [0, 1] to the units that stay.

    In a class of one group the level is the share of its units that goes; in a larger one, of the units
    of all its groups together, those of lowest score. Widths are the nearest that the bounds allow.

    Args:
        members: classes of groups, from `classes`.
        scores: by group name, shape `[group.size]`, comparable within a class.
        allowed: by group name, the widths that it may have.
    """

    def __init__(
        self,
        members: Sequence[Sequence[Group]],
        scores: Mapping[str, Floats],
        allowed: Mapping[str, Bounds],
    ) -> None:
        self._classes = tuple(tuple(groups) for groups in members)
        self._scores = scores
        self._allowed = allowed
        self._places: dict[str, Floats] = {}
        for groups in self._classes:
            self._place(groups)

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, class by class."""
        return tuple(group for groups in self._classes for group in groups)

    def kept(self, level: float) -> Kept:
        """Return for every group that gets narrower the units that stay."""
        widths = {g.name: self._allowed[g.name].width(g, self._share(g, level)) for g in self.groups}
        return {
            g.name: strongest(self._scores[g.name], widths[g.name], g.blocks)
            for g in self.groups
            if widths[g.name] < g.size
        }

    def lost(self, name: str, units: NDArray[np.int64]) -> float:
        """Return the scores of some units of a group, summed."""
        return float(self._scores[name][units].sum())

    def _share(self, group: Group, level: float) -> float:
        """Return the share of a group's units that goes at a level."""
        places = self._places.get(group.name)
        return level if places is None else float(np.searchsorted(places, level)) / group.size

    def _place(self, groups: Sequence[Group]) -> None:
        """Note at which levels the units of each group go, ascending."""
        if len(groups) < 2:
            return
        owner = np.repeat(np.arange(len(groups)), [group.size for group in groups])
        order = np.argsort(np.concatenate([self._scores[g.name] for g in groups]), kind="stable")
        levels = (np.arange(len(order)) + 0.5) / len(order)
        for number, group in enumerate(groups):
            self._places[group.name] = levels[owner[order] == number]


def smallest_cut(ranking: Ranking, cost: Callable[[Kept], float], allowed: float) -> Kept:
    """Return the smallest cut whose cost is allowed, or the largest cut where none is.

    Bisection finds the level; between the last cut that costs too much and the first that does not, groups
    are narrowed one at a time, least score lost for the cost saved first, until the cost is allowed.

    Args:
        ranking: the order in which units go.
        cost: of a cut; never rises when more goes.
        allowed: the largest cost wanted.
    """
    few, many = ranking.kept(0.0), ranking.kept(1.0)
    if cost(few) <= allowed or cost(many) > allowed:
        return few if cost(few) <= allowed else many
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        kept = ranking.kept(middle)
        if cost(kept) <= allowed:
            high, many = middle, kept
        else:
            low, few = middle, kept
        if same(few, many):
            break
    return _narrowed(ranking, cost, allowed, (few, many))


def same(first: Mapping[str, NDArray[np.int64]], second: Mapping[str, NDArray[np.int64]]) -> bool:
    """Tell whether two cuts keep the same units."""
    return first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)


def _narrowed(
    ranking: Ranking, cost: Callable[[Kept], float], allowed: float, between: tuple[Kept, Kept]
) -> Kept:
    few, many = between
    whole = cost(few)

    def worth(name: str) -> float:
        size = next(g.size for g in ranking.groups if g.name == name)
        gone = np.setdiff1d(few.get(name, np.arange(size)), many[name])
        saved = whole - cost({**few, name: many[name]})
        return ranking.lost(name, gone) / saved if saved > 0 else math.inf

    kept = dict(few)
    changed = [n for n in many if n not in few or not np.array_equal(few[n], many[n])]
    for name in sorted(changed, key=worth):
        kept[name] = many[name]
        if cost(kept) <= allowed:
            break
    return kept


def units_left(ranking: Ranking, kept: Kept) -> float:
    """Return which share of all units a cut leaves."""
    total = sum(group.size for group in ranking.groups)
    return sum(len(kept.get(g.name, range(g.size))) for g in ranking.groups) / max(total, 1)
