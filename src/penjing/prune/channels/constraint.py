"""From a share of parameters, multiply-adds, bytes or milliseconds to a cut that truly removes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from penjing.arrays.structure.cut_cost import (
    multiply_adds_removed,
    parameters_removed,
    shares_left,
    unit_costs,
)
from penjing.arrays.structure.ranking import Kept, Ranking, same, smallest_cut
from penjing.core.backend import Group, Groups, Layer
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.scratch import scratch
from penjing.core.value import Model
from penjing.prune.channels.method import PruneChannels

EXACT = 1e-3
"""A prediction this near to the truth needs no second probe: rounding of widths decides the rest."""

NEAR = {"size": 0.01, "latency": 0.02}
"""How much more than asked may go before a smaller cut is tried, where predictions are not exact."""

PROBES = 8
"""Most cuts that are measured."""

_AIMS = 24
_EXTRAPOLATED = 3
_BYTES = 4
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

    def told(self, probe: Reached, aim: float) -> None:
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
        search.told(probe, aim)
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
        "the share can be removed",
        value=f"{1 - search.allowed:.3g}",
        place=place,
        fix=f"ask for at most {most:.3g} (found: {least.how}), lower the floor or round_to, or "
        "cover more layers",
    )


def prices(
    model: Model, method: PruneChannels, context: Context, groups: Sequence[Group], layers: tuple[Layer, ...]
) -> dict[str, float]:
    """Return what one unit of each group saves of what the ratio is a share of, above 0.

    Parameters for `parameters` and `size`, multiply-adds for `multiply_adds` and `latency`.
    """
    shapes = {layer.name: layer.shapes for layer in layers}
    if method.of in ("parameters", "size"):
        found = unit_costs(groups, partial(parameters_removed, shapes=shapes))
    else:
        dense = context.backend.operations(model, context.task.valid.example())
        found = unit_costs(groups, partial(multiply_adds_removed, shapes=shapes, by_layer=dense.by_layer))
    return {name: max(cost, 1.0) for name, cost in found.items()}


@contextmanager
def quantity_of(
    model: Model, method: PruneChannels, context: Context, groups: Groups, layers: tuple[Layer, ...]
) -> Iterator[Quantity]:
    """Give the quantity that the method's ratio is a share of, for one model."""
    shapes = {layer.name: layer.shapes for layer in layers}
    backend, example = context.backend, context.task.valid.example()
    dense = backend.operations(model, example)

    def parameters(kept: Kept) -> float:
        return 1 - parameters_removed(shares_left(groups.groups, kept), shapes) / max(dense.parameters, 1)

    def multiply_adds(kept: Kept) -> float:
        shares = shares_left(groups.groups, kept)
        return 1 - multiply_adds_removed(shares, shapes, dense.by_layer) / max(dense.multiply_adds, 1)

    def counted(candidate: Model) -> tuple[float, str]:
        name = method.of
        after, before = (getattr(c, name) for c in (backend.operations(candidate, example), dense))
        return after / max(before, 1), f"{after} of {before} {name.replace('_', '-')}"

    if method.of == "parameters":
        yield Quantity(parameters, counted)
    elif method.of == "multiply_adds":
        yield Quantity(multiply_adds, counted)
    elif method.of == "size":
        with scratch() as folder:
            file = folder / "model.onnx"

            def bytes_of(candidate: Model) -> int:
                backend.export(candidate, example, file)
                return file.stat().st_size

            whole = bytes_of(model)

            def size(candidate: Model) -> tuple[float, str]:
                found = bytes_of(candidate)
                return found / whole, f"{found} of {whole} bytes of ONNX"

            weights = _BYTES * dense.parameters / whole
            yield Quantity(lambda kept: 1 - weights * (1 - parameters(kept)), size, NEAR["size"])
    else:
        with _clock(model, method, context) as latency:
            yield Quantity(multiply_adds, latency, NEAR["latency"])


@contextmanager
def _clock(
    model: Model, method: PruneChannels, context: Context
) -> Iterator[Callable[[Model], tuple[float, str]]]:
    """Give a function that measures a model's latency against the uncut one's, interleaved."""
    from penjing.measurement.side_by_side import beside

    with beside(model, method.target, context.task.valid) as ratio_of:

        def latency(candidate: Model) -> tuple[float, str]:
            ratio = ratio_of(candidate)
            return ratio.value, (
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of the latency before, "
                f"{method.target.label}, {ratio.n} interleaved rounds"
            )

        yield latency


def units_left(ranking: Ranking) -> Callable[[Kept], float]:
    """Return the function that tells which share of all units a cut leaves."""
    total = sum(group.size for group in ranking.groups)

    def left(kept: Kept) -> float:
        return sum(len(kept.get(g.name, range(g.size))) for g in ranking.groups) / max(total, 1)

    return left
