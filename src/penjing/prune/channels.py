"""Remove whole channels and heads, so that the network truly shrinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from penjing.arrays.scores import SCORES, Floats, ScoreName, Tensors, consumers
from penjing.arrays.structure.cut_cost import (
    multiply_adds_removed,
    parameters_removed,
    shares_left,
    unit_costs,
)
from penjing.arrays.structure.ranking import (
    Bounds,
    Kept,
    Ranking,
    Selection,
    bounds,
    classes,
    smallest_cut,
    units_left,
)
from penjing.arrays.structure.reach import EXACT, Quantity, reach
from penjing.arrays.structure.selection import kept_width
from penjing.arrays.structure.width_changes import reasons_by_layer, why_uncovered, width_changes
from penjing.core.backend import GradientBackend, Group, Groups, Layer, Sample
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.target import Target
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.measurement.cost import Cost

Share = Annotated[float, Field(ge=0, le=1)]
Shares = Share | tuple[tuple[str, Share], ...]
Kind = Literal["channel", "head", "head width", "hidden"]
Of = Literal["units", "parameters", "multiply_adds", "size", "latency"]

NEAR = {"size": 0.01, "latency": 0.02}
"""How much more than asked may go before a smaller cut is tried, where predictions are not exact."""

_BYTES = 4
_WITHOUT_DATA = ("seed", "weights")
_UNITS = {"head width": "positions in heads", "hidden": "hidden channels"}


class PruneChannels(Method):
    """Remove channels, attention heads and neurons from groups of coupled layers.

    Channels go through residual adds, concatenation, BatchNorm, depthwise and grouped convolutions and
    flattening together (Fang et al. 2023); what cannot shrink is reported with the reason.

    Attributes:
        ratio: share that is removed, between 0 and 1, both excluded.
        of: what the ratio is a share of. `units`: of each group's (`local`) or of all groups' units. Else of
            the whole model's `parameters`, `multiply_adds` for one example, `size` of its ONNX file, or
            measured `latency` on the target: the smallest cut that removes at least this share.
        score: how units are ranked, a name in `penjing.arrays.scores.SCORES`.
        selection: which units compete. `local`: those of one group, so that every group loses the same share;
            `global`: all; `isomorphic`: those of groups with equal topology (Fang et al. 2024). Where
            groups compete for a share of the whole model's cost, scores that estimate the loss (`taylor`,
            `fisher`, `output_fisher`, `hessian`, `refit`) are taken for each multiply-add or parameter saved.
        floor: least share of every group that stays; or pairs of a layer pattern and a share, of which the
            first that matches counts, 0 for none. One multiple of `round_to` always stays.
        ceiling: largest share of every group that stays, in the same form, 1 for none.
        round_to: what stays is a multiple of this many channels, at least one multiple; narrower groups
            stay whole. A unit of several channels (a head) counts all of them.
        units: kinds of units that may go: `channel` (also neurons), `head`, `hidden` (the width of a
            residual stream that is normalized as a whole), or `head width` alone.
        target: where `latency` is measured.
        examples: training examples for scores that need data, at least 1, in whole batches.
        batch_size: examples that run at once, at least 1; scores of the gradient (`taylor`) are means over
            batches.

    >>> PruneChannels(0.5, selection="global", of="multiply_adds").ratio
    0.5
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    ratio: float = Field(gt=0, lt=1)
    of: Of = "units"
    score: ScoreName = "l2"
    selection: Selection = "local"
    floor: Shares = 0.1
    ceiling: Shares = 1.0
    round_to: int = Field(default=8, ge=1, le=1024)
    units: tuple[Kind, ...] = ("channel", "head")
    target: Target = Field(default_factory=Target)
    examples: int = Field(default=512, ge=1, le=1_000_000)
    batch_size: int = Field(default=32, ge=1)

    def __init__(self, ratio: float, **fields: Any) -> None:
        super().__init__(**{"ratio": ratio, **fields})

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if not self.units or len(set(self.units)) < len(self.units):
            raise ValueError(
                f"units must name at least one kind, each once, got {self.units}; write units=('channel',)"
            )
        if "head width" in self.units and len(self.units) > 1:
            raise ValueError(
                "units cannot name 'head width' beside others, since whole heads are other units than their "
                "width; write units=('head width',)"
            )
        return self

    @property
    def batches(self) -> tuple[int, int]:
        """How many batches the examples make, and how many are in each."""
        size = min(self.batch_size, self.examples)
        return self.examples // size, size

    def floor_of(self, layers: tuple[str, ...]) -> float:
        """Return the least share that stays of a group with these layers: the largest of theirs."""
        return max((_share(self.floor, layer, 0.0) for layer in layers), default=0.0)

    def ceiling_of(self, layers: tuple[str, ...]) -> float:
        """Return the largest share that stays of a group with these layers: the smallest of theirs."""
        return min((_share(self.ceiling, layer, 1.0) for layer in layers), default=1.0)


def _share(shares: Shares, layer: str, none: float) -> float:
    if isinstance(shares, float):
        return shares
    return next((share for pattern, share in shares if fnmatchcase(layer, pattern)), none)


@dataclass(frozen=True)
class _Cut:
    """What is cut, and how: the same for every step from the groups to the smaller model."""

    model: Model
    method: PruneChannels
    context: Context
    groups: Groups
    layers: tuple[Layer, ...]

    def keep(self, kept: Kept) -> Model:
        """Return the model with only these units."""
        return self.context.backend.keep(self.model, self.groups, kept) if kept else self.model


@handles(PruneChannels)
def prune_channels(model: Model, method: PruneChannels, context: Context) -> Outcome:
    """Score, select and cut; one change for every convolution and linear layer that the plan covers.

    Raises:
        Refused: too little data for the score, a score that the backend has not, or a share that cannot be
            removed.
    """
    _refuse_too_little_data(method, context)
    _note_earlier_cuts(model, context)
    heads: Literal["whole", "width"] = "width" if method.units == ("head width",) else "whole"
    groups = context.backend.groups(model, context.task.valid.example(), heads)
    cut = _Cut(model, method, context, groups, context.backend.layers(model))
    reasons = {group.name: _why_left_out(group, cut) for group in groups.groups}
    chosen = [group for group in groups.groups if not reasons[group.name]]
    result = model
    if chosen:
        scores = _score(cut, chosen)
        absent = f"no score {method.score}: {SCORES[method.score].absent}"
        reasons |= {group.name: absent for group in chosen if group.name not in scores}
        scored = [group for group in chosen if group.name in scores]
        result, kept = _select_and_cut(cut, _rank(cut, scored, scores))
        reasons |= {g.name: _why_width(g, len(kept.get(g.name, range(g.size))), method) for g in scored}
    layers = cut.layers, context.backend.layers(result)
    told = reasons_by_layer(groups, reasons)
    return Outcome(result, width_changes(method, layers, groups, told, context.covers))


def _refuse_too_little_data(method: PruneChannels, context: Context) -> None:
    """Refuse training data of less than one batch, where the score needs data."""
    (_, size), found = method.batches, len(context.task.train)
    if SCORES[method.score].needs not in _WITHOUT_DATA and found < size:
        raise Refused(
            f"must have a batch of {size} examples for the score {method.score}",
            value=found,
            place="task.train",
            fix="lower PruneChannels.batch_size, or use score='l2'",
        )


def _note_earlier_cuts(model: Model, context: Context) -> None:
    if context.backend.name != "torch":
        return
    from penjing.backends.torch.structure.history import history

    if steps := len(history(model)):
        said = f"found a model that was cut before ({steps} steps): shares are of what it is now"
        _note(context, f"PruneChannels {said}")


def _note(context: Context, line: str) -> None:
    context.notes.setdefault("pruning", []).append(line)


def _why_left_out(group: Group, cut: _Cut) -> str:
    """Say why a group may not shrink, before anything is scored; empty if it may."""
    if outside := why_uncovered(group, cut.context.covers):
        return outside
    if group.kind not in cut.method.units:
        return f"its units are of the kind {group.kind!r}, which PruneChannels.units does not name"
    return ""


# Scores: what each needs, from the backend and the data.


def _score(cut: _Cut, groups: list[Group]) -> dict[str, Floats]:
    """Return the scores of groups by name, those of different groups in one unit.

    Groups that the score says nothing of are left out.

    Raises:
        Refused: a score with gradients on a backend without them, or one that is not finite.
    """
    score, context = SCORES[cut.method.score], cut.context
    tensors = {layer.name: context.backend.read(cut.model, layer.name) for layer in cut.layers}
    found: Mapping[str, Floats | None]
    if score.needs == "seed":
        found = {group.name: score.function(group, context.seed) for group in groups}
    elif score.needs == "weights":
        found = {group.name: score.function(group, tensors) for group in groups}
    elif score.needs == "inputs":
        found = score.function(groups, tensors, _observe_inputs(cut, groups))
    else:
        found = _score_by_gradients(cut, groups, tensors)
    scores = {name: values for name, values in found.items() if values is not None}
    _refuse_not_finite(scores, cut.method)
    return scores if score.comparable else {name: _by_mean(values) for name, values in scores.items()}


def _score_by_gradients(cut: _Cut, groups: list[Group], tensors: Tensors) -> dict[str, Floats]:
    score, method, task = SCORES[cut.method.score], cut.method, cut.context.task
    backend = cut.context.backend
    if not isinstance(backend, GradientBackend):
        raise Refused(
            f"must be a score without gradients on a model of {backend.name}",
            value=repr(method.score),
            place="PruneChannels.score",
            fix="use score='l2', or prune before the model leaves its framework",
        )
    sample = Sample(task.train, task.loss, *method.batches, cut.context.seed)
    layers = list(dict.fromkeys(slot.layer for group in groups for slot in consumers(group)))
    found: dict[str, Floats]
    if score.needs == "gates":
        found = score.function(groups, backend.gate_gradients(cut.model, layers, sample))
    elif score.needs == "curvature":
        found = score.function(groups, tensors, backend.hessian_diagonals(cut.model, sample))
    elif score.needs == "factors":
        found = score.function(groups, tensors, backend.kronecker_factors(cut.model, layers, sample))
    else:
        gradients = backend.gradients(
            cut.model, sample.split, sample.loss, sample.batches, sample.size, sample.seed
        )
        found = score.function(groups, tensors, gradients)
    return found


def _observe_inputs(cut: _Cut, groups: list[Group]) -> Iterator[dict[str, NDArray[np.floating]]]:
    """Yield the inputs of the consuming layers that the backend can observe, batch by batch."""
    method, context = cut.method, cut.context
    slots = [slot for group in groups for slot in consumers(group)]
    # Attention in one module has several inputs, and its weights names of their own.
    wanted = list(dict.fromkeys(slot.layer for slot in slots if slot.tensor == "weight"))
    seen = wanted
    if not _is_observable(cut, wanted):
        seen = [layer for layer in wanted if _is_observable(cut, [layer])]
    count, size = method.batches
    data = islice(context.task.train.batches(size, context.seed), count)
    for batch in context.backend.observe(cut.model, seen, data):
        yield {layer: x for layer, (x, _) in batch.items()}


def _is_observable(cut: _Cut, layers: list[str]) -> bool:
    """Tell whether the backend can observe these layers, by one example."""
    example = cut.context.task.valid.example()
    try:
        next(cut.context.backend.observe(cut.model, layers, iter([(example, np.zeros(1))])))
    except Refused:
        return False
    return True


def _by_mean(values: Floats) -> Floats:
    mean = float(values.mean())
    return values / mean if mean > 0 else values


def _refuse_not_finite(scores: Mapping[str, Floats], method: PruneChannels) -> None:
    bad = [name for name, values in scores.items() if not np.isfinite(values).all()]
    if bad:
        raise Refused(
            f"must give finite numbers with the score {method.score}",
            value=f"NaN or infinite values for {', '.join(bad[:5])}",
            place="the loss on task.train",
            fix="look for a loss or a target that is NaN or infinite, or use score='l2'",
        )


# Selection: one order in which units go, and the smallest cut that the ratio asks for.


def _rank(cut: _Cut, groups: list[Group], scores: dict[str, Floats]) -> Ranking:
    method, kinds = cut.method, {layer.name: layer.kind for layer in cut.layers}
    if method.of != "units" and method.selection != "local" and SCORES[method.score].loss:
        prices = _unit_prices(cut, method.of, groups)
        scores = {name: scores[name] / prices[name] for name in scores}
    allowed = {group.name: _allowed(group, method) for group in groups}
    return Ranking(classes(groups, kinds, method.selection), scores, allowed)


def _allowed(group: Group, method: PruneChannels) -> Bounds:
    floor, ceiling = method.floor_of(group.layers), method.ceiling_of(group.layers)
    return bounds(group, method.round_to, floor, ceiling)


def _unit_prices(cut: _Cut, of: Cost, groups: Sequence[Group]) -> dict[str, float]:
    """Return what one unit of each group saves of a cost, above 0.

    Parameters for `parameters` and `size`, multiply-adds for `multiply_adds` and `latency`.
    """
    shapes = {layer.name: layer.shapes for layer in cut.layers}
    if of in ("parameters", "size"):
        found = unit_costs(groups, partial(parameters_removed, shapes=shapes))
    else:
        dense = cut.context.backend.operations(cut.model, cut.context.task.valid.example())
        found = unit_costs(groups, partial(multiply_adds_removed, shapes=shapes, by_layer=dense.by_layer))
    return {name: max(cost, 1.0) for name, cost in found.items()}


def _select_and_cut(cut: _Cut, ranking: Ranking) -> tuple[Model, Kept]:
    """Return the model without what the ratio asks for, and what every group keeps.

    Raises:
        Refused: the largest cut removes less than the ratio.
    """
    method, place = cut.method, "PruneChannels.ratio"
    if not ranking.groups:
        return cut.model, {}
    if method.of != "units":
        with _open_quantity(cut, method.of) as quantity:
            found = reach(ranking, quantity, cut.keep, method.ratio, place)
        _note(cut.context, f"PruneChannels left {found.how} ({method.ratio:.1%} was to go)")
        return found.model, found.kept
    if method.selection == "local":
        kept = ranking.kept(method.ratio)
        return cut.keep(kept), kept
    left = partial(units_left, ranking)
    kept = smallest_cut(ranking, left, 1 - method.ratio)
    if left(kept) > 1 - method.ratio + 1e-9:
        raise Refused(
            f"must be at most {1 - left(kept):.3g}, the share of the units that can go",
            value=method.ratio,
            place=place,
            fix=f"ask for {1 - left(kept):.3g}, lower the floor, or cover more layers",
        )
    return cut.keep(kept), kept


@contextmanager
def _open_quantity(cut: _Cut, of: Cost) -> Iterator[Quantity]:
    """Give the cost that the ratio is a share of: predicted from shapes, and measured on cut models."""
    from penjing.measurement.cost import open_meter

    shapes = {layer.name: layer.shapes for layer in cut.layers}
    with open_meter(cut.model, of, cut.method.target, cut.context) as meter:
        dense = meter.dense

        def parameters(kept: Kept) -> float:
            removed = parameters_removed(shares_left(cut.groups.groups, kept), shapes)
            return 1 - removed / max(dense.parameters, 1)

        def multiply_adds(kept: Kept) -> float:
            removed = multiply_adds_removed(shares_left(cut.groups.groups, kept), shapes, dense.by_layer)
            return 1 - removed / max(dense.multiply_adds, 1)

        def size(kept: Kept) -> float:
            return 1 - _BYTES * dense.parameters / meter.file_bytes * (1 - parameters(kept))

        predicted = {"parameters": parameters, "size": size}.get(of, multiply_adds)
        yield Quantity(predicted, meter.share, NEAR.get(of, EXACT))


def _why_width(group: Group, width: int, method: PruneChannels) -> str:
    """Say why a scored group keeps all units, or more or fewer than the ratio asks for; empty otherwise."""
    allowed, units = _allowed(group, method), _UNITS.get(group.kind, f"{group.kind}s")
    multiple = f"{method.round_to} channels" if allowed.step == method.round_to else f"{allowed.step} {units}"
    uniform = method.of == "units" and method.selection == "local"
    wanted = kept_width(group.size, method.ratio, len(np.unique(group.blocks)), allowed.step)
    if uniform and width != wanted:
        bound, share = ("floor", method.floor_of) if width > wanted else ("ceiling", method.ceiling_of)
        return f"the {bound} keeps {share(group.layers):.0%} of {group.size} {units}"
    if width == group.size:
        if uniform or group.size <= allowed.step:
            return f"{group.size} {units}, rounded to a multiple of {multiple}, stay whole"
        return f"all {group.size} {units} rank above those that go"
    if uniform and group.size * (1 - method.ratio) < width / 2:
        return f"the ratio would leave less than one multiple of {multiple}"
    return ""
