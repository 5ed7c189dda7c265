"""From a share of some cost to the smallest cut that truly removes it: predicted, probed, corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from penjing.arrays.structure.ranking import Kept, Ranking, same, smallest_cut
from penjing.core.errors import Refused
from penjing.core.value import Model

EXACT = 1e-3
"""A prediction this near to the truth needs no second probe: rounding of widths decides the rest."""

PROBES = 8
"""Most cuts that are measured."""

_AIMS = 24
_EXTRAPOLATED = 3
_TINY = 1e-9


@dataclass(frozen=True)
class Quantity:
    """Something of which a share has to go.

    Attributes:
        predicted: share left after a cut, from shapes; never rises when more goes.
        measured: share left in a model that was cut, and how it was found, in words.
        near: how far below the allowed share a cut may land.
    """

    predicted: Callable[[Kept], float]
    measured: Callable[[Model], tuple[float, str]]
    near: float = EXACT


@dataclass(frozen=True)
class Reached:
    """A cut, the model that it gave, the share that is left and how that was found."""

    kept: Kept
    model: Model
    left: float
    how: str


@dataclass
class _Search:
    """Probes so far, and the two aims between which the right one lies, with what they left."""

    allowed: float
    near: float
    probes: list[Reached] = field(default_factory=list)
    best: Reached | None = None
    enough: tuple[float, float] | None = None
    missed: tuple[float, float] = (1.0, 1.0)
    before: tuple[float, float] = (1.0, 1.0)

    def known(self, kept: Kept) -> Reached | None:
        return next((probe for probe in self.probes if same(kept, probe.kept)), None)

    def add(self, probe: Reached, aim: float) -> None:
        """Take a probe in, and note on which side of the allowed share it lies."""
        if self.known(probe.kept) is None:
            # Models are large; only the best one is kept.
            self.probes.append(replace(probe, model=None))
        if probe.left > self.allowed + _TINY:
            self.before, self.missed = self.missed, min(self.missed, (aim, probe.left))
            return
        if self.enough is None or aim > self.enough[0]:
            self.enough = (aim, probe.left)
        if self.best is None or probe.left > self.best.left:
            self.best = probe

    def next_aim(self) -> float:
        """Interpolate between the nearest aims on both sides; if one is missing, extrapolate, then halve."""
        (aim, left), (other, over) = self.missed, self.enough or self.before
        wanted = self.allowed - self.near / 2
        low = self.enough[0] if self.enough else 0.0
        slope = (over - left) / (other - aim) if other != aim else 0.0
        found = aim + (wanted - left) / slope if slope > 0 else -1.0
        halve = self.enough is None and len(self.probes) > _EXTRAPOLATED
        return (low + aim) / 2 if halve or not low < found < aim else found


def reach(
    ranking: Ranking, quantity: Quantity, cut: Callable[[Kept], Model], ratio: float, place: str
) -> Reached:
    """Return the smallest cut found that removes at least a share, true of the model that it gives.

    A first cut is chosen by the prediction; where the truth differs, the aim is corrected and probed again.

    Args:
        ranking: the order in which units go.
        quantity: what has to go.
        cut: makes the model of a cut.
        ratio: least share that goes.
        place: for the refusal.

    Raises:
        Refused: even the largest cut removes less; says how much it removes.
    """
    search, aim = _Search(1 - ratio, quantity.near), 1 - ratio
    for _ in range(_AIMS):
        kept = smallest_cut(ranking, quantity.predicted, aim)
        probe = search.known(kept) or _probe(quantity, cut, kept)
        search.add(probe, aim)
        exact = abs(probe.left - quantity.predicted(kept)) <= EXACT
        done = search.best is not None and (exact or search.allowed - search.best.left <= quantity.near)
        unreachable = search.best is None and same(kept, ranking.kept(1.0))
        if done or unreachable or len(search.probes) == PROBES:
            break
        aim = search.next_aim()
    if search.best is None:
        raise _unreachable(search, place)
    return search.best


def _probe(quantity: Quantity, cut: Callable[[Kept], Model], kept: Kept) -> Reached:
    model = cut(kept)
    return Reached(kept, model, *quantity.measured(model))


def _unreachable(search: _Search, place: str) -> Refused:
    least = min(search.probes, key=lambda probe: probe.left)
    most = max(0.0, 1 - least.left)
    return Refused(
        f"must be at most {most:.3g}, the share that the largest cut removes ({least.how} are left)",
        value=f"{1 - search.allowed:.3g}",
        place=place,
        fix=f"ask for {most:.3g}, lower the floor or round_to, or cover more layers",
    )
