"""From a share of parameters, multiply-adds, bytes or milliseconds to a cut that truly removes it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from penjing.arrays.cut_cost import multiply_adds_removed, parameters_removed, shares_left
from penjing.arrays.ranking import Kept, Ranking, same, smallest_cut
from penjing.core.backend import Groups, Layer
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Model
from penjing.prune.channels.method import PruneChannels

EXACT = 1e-3
"""A prediction this near to the truth needs no second probe: rounding of widths decides the rest."""

NEAR = {"latency": 0.02}
"""How much more than asked may go before a smaller cut is tried, where predictions are not exact."""

PROBES = 6
_BYTES = 4


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
    """Probes so far: the best that is allowed, and the aims between which the right one lies."""

    allowed: float
    probes: list[Reached] = field(default_factory=list)
    best: Reached | None = None
    enough: float = 0.0
    missed: float = 1.0

    def told(self, probe: Reached, aim: float) -> None:
        self.probes.append(probe)
        if probe.left <= self.allowed + 1e-9:
            self.enough = max(self.enough, aim)
            if self.best is None or probe.left > self.best.left:
                self.best = probe
        else:
            self.missed = min(self.missed, aim)

    def next_aim(self, aim: float, left: float) -> float:
        """Scale the aim by what the last probe missed; halve where that leaves what is known."""
        scaled = aim * self.allowed / left if left > 0 else 1.0
        inside = self.enough < scaled < self.missed
        return scaled if inside else (self.enough + self.missed) / 2


def reach(
    ranking: Ranking, quantity: Quantity, cut: Callable[[Kept], Model], ratio: float, place: str
) -> Reached:
    """Return the smallest cut found that removes at least a share, true of the model that it gives.

    A first cut is chosen by the prediction; where the truth differs, the aim is corrected and probed again,
    at most six times.

    Args:
        ranking: the order in which units go.
        quantity: what has to go.
        cut: makes the model of a cut.
        ratio: least share that goes.
        place: for the refusal.

    Raises:
        Refused: even the largest cut removes less; says how much it removes.
    """
    search, aim = _Search(1 - ratio), 1 - ratio
    for _ in range(PROBES):
        kept = smallest_cut(ranking, quantity.predicted, aim)
        if any(same(kept, probe.kept) for probe in search.probes):
            break
        model = cut(kept)
        left, how = quantity.measured(model)
        search.told(Reached(kept, model, left, how), aim)
        exact = abs(left - quantity.predicted(kept)) <= EXACT
        if search.best is not None and (exact or 0 <= search.allowed - left <= quantity.near):
            break
        aim = search.next_aim(aim, left)
    return search.best or _largest(ranking, quantity, cut, search, place)


def _largest(
    ranking: Ranking, quantity: Quantity, cut: Callable[[Kept], Model], search: _Search, place: str
) -> Reached:
    kept = ranking.kept(1.0)
    found = next((probe for probe in search.probes if same(kept, probe.kept)), None)
    if found is None:
        model = cut(kept)
        found = Reached(kept, model, *quantity.measured(model))
    if found.left > search.allowed + 1e-9:
        largest = max(0.0, 1 - min(probe.left for probe in (found, *search.probes)))
        raise Refused("the share can be removed", value=f"{1 - search.allowed:.3g}", place=place,
                      fix=f"ask for at most {largest:.3g} (found: {found.how}), lower the floor or round_to, "
                      "or cover more layers")  # fmt: skip
    return found


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
        with tempfile.TemporaryDirectory(prefix="penjing-") as folder:
            file = Path(folder) / "model.onnx"

            def bytes_of(candidate: Model) -> int:
                backend.export(candidate, example, file)
                return file.stat().st_size

            whole = bytes_of(model)

            def size(candidate: Model) -> tuple[float, str]:
                found = bytes_of(candidate)
                return found / whole, f"{found} of {whole} bytes of ONNX"

            weights = _BYTES * dense.parameters / whole
            yield Quantity(lambda kept: 1 - weights * (1 - parameters(kept)), size)
    else:
        with _clock(model, method, context) as latency:
            yield Quantity(multiply_adds, latency, NEAR["latency"])


@contextmanager
def _clock(
    model: Model, method: PruneChannels, context: Context
) -> Iterator[Callable[[Model], tuple[float, str]]]:
    """Give a function that measures a model's latency against the uncut one's, interleaved."""
    from penjing.measuring.side_by_side import beside

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
