"""Which set of blocks costs least when it goes as a whole: a search that measures sets, never sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Chosen = tuple[int, ...]
"""Numbers of blocks in network order, sorted."""

BEAM = 2
"""Sets that the greedy search carries from size to size."""


@dataclass
class Judge:
    """Measures sets of blocks, each once, and no more than `most` of them.

    Attributes:
        measure: the divergence of the network without these blocks.
        most: sets that may be measured.
        known: what was measured, by set.
    """

    measure: Callable[[Chosen], float]
    most: int
    known: dict[Chosen, float] = field(default_factory=dict)
    spent: int = 0

    def __call__(self, chosen: Iterable[int]) -> float:
        """Return the divergence of a set; infinite where it is new and nothing may be measured any more."""
        key = tuple(sorted(chosen))
        if key not in self.known:
            if self.spent >= self.most:
                return math.inf
            self.spent += 1
            self.known[key] = self.measure(key)
        return self.known[key]

    def best(self, size: int) -> Chosen | None:
        """Return the best set of a size among those measured; ties go to the later blocks."""
        sets = [s for s in self.known if len(s) == size and math.isfinite(self.known[s])]
        return min(sets, key=lambda s: (self.known[s], [-i for i in s])) if sets else None


def additive_choice(single: Mapping[int, float], count: int) -> Chosen:
    """Return the blocks of the smallest single divergences: the choice that ignores how removals interact.

    The baseline of the joint search, and the cheap ranking where the scores are Block Influence.
    """
    return tuple(sorted(sorted(single, key=lambda i: (single[i], -i))[:count]))


def joint_choice(candidates: Sequence[int], count: int, judge: Judge) -> Chosen:
    """Return the set of `count` blocks whose removal, measured as a whole, diverges least.

    All sets where they are few enough. Else contiguous windows (what is removed in one piece often costs
    least: Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers"), a greedy search
    that measures every extension of its best sets anew, and swaps around the best set found. Sums of single
    costs, which mislead (algorithms that add them lose to any joint measure), only order what is tried.

    Args:
        candidates: numbers of blocks in network order.
        count: how many go, at least 1 and at most all.
        judge: measures a set; its limit bounds the search, and the best set measured so far wins.
    """
    if math.comb(len(candidates), count) <= judge.most - judge.spent:
        for chosen in itertools.combinations(candidates, count):
            judge(chosen)
    else:
        single = {i: judge((i,)) for i in candidates}
        _windows(candidates, count, judge)
        judge(additive_choice(single, count))
        _greedy(single, count, judge)
        _swap(single, count, judge)
    found = judge.best(count)
    return found or additive_choice({i: judge.known.get((i,), math.inf) for i in candidates}, count)


def _windows(candidates: Sequence[int], count: int, judge: Judge) -> None:
    """Measure windows, spread evenly where there are more than a quarter of what may be measured."""
    starts = range(len(candidates) - count + 1)
    step = max(1, math.ceil(len(starts) / max(judge.most // 4, 1)))
    for start in starts[::step]:
        judge(candidates[start : start + count])


def _greedy(single: Mapping[int, float], count: int, judge: Judge) -> None:
    """Extend the best sets block by block; the width of each step fits what may still be measured."""
    order = sorted(single, key=lambda i: (single[i], -i))
    beam: list[Chosen] = [(i,) for i in order[:BEAM]]
    for size in range(2, count + 1):
        left = (judge.most - judge.spent) * 3 // 4
        width = max(2, left // max((count - size + 1) * BEAM, 1))
        for chosen in beam:
            for extra in [i for i in order if i not in chosen][:width]:
                judge((*chosen, extra))
        sets = [s for s in judge.known if len(s) == size]
        found = sorted(sets, key=lambda s: (judge.known[s], [-i for i in s]))[:BEAM]
        # Where nothing may be measured any more, single costs complete the set.
        beam = found or [tuple(sorted((*s, next(i for i in order if i not in s)))) for s in beam[:1]]


def _swap(single: Mapping[int, float], count: int, judge: Judge) -> None:
    """Exchange one block of the best set for one outside, as long as that helps and may be measured."""
    order = sorted(single, key=lambda i: (single[i], -i))
    while (best := judge.best(count)) is not None:
        for gone in sorted(best, key=lambda i: -single[i]):
            rest = [i for i in best if i != gone]
            for extra in order:
                if extra not in best:
                    judge((*rest, extra))
        if judge.best(count) == best:
            return
