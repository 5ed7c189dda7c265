"""Remove attention heads and feed-forward neurons, widths chosen for all layers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.scores import consumer_of, consumers
from penjing.arrays.structure.mask_search import (
    Widths,
    allocate,
    fisher,
    losses_of_widths,
    mask_gradients,
    ranked,
    rearrange,
    width_options,
)
from penjing.arrays.structure.width_changes import reasons_by_layer, why_uncovered, width_changes
from penjing.arrays.unit_surgeon import surgeon
from penjing.core.backend import GradientBackend, Group, Groups, Layer, Sample
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.target import Target
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.measurement.cost import Meter

LEAST_EXAMPLES = 32
ATTEMPTS = 5
"""Most cuts that are measured."""

PROBES = 4
"""Widths of a class of like groups that are timed beside the whole; times between them are interpolated."""

Floats = NDArray[np.float64]
Units = NDArray[np.int64]
Kept = dict[str, Units]


class PruneTransformer(Method):
    """Remove the attention heads and feed-forward neurons that matter least, without training.

    Units are judged layer by layer; then widths are chosen for all layers at once, so that the least is lost
    at the cost asked for (Kwon et al. 2022, "A fast post-training pruning framework for transformers").
    Nothing is trained; follow it with `LeastSquares`.

    Attributes:
        criterion: `masks`: each unit gets a mask, whose Fisher information tells what the loss gains without
            the unit; which units go is settled within each layer, as a set (Kwon et al.). `refit`: units go
            one after the other by what the loss gains once the layers behind are refitted by least squares,
            with curvature factored by Kronecker (Kurtic et al. 2023, "ZipLM"; Martens & Grosse 2015); takes
            8 (inputs**2 + outputs**2) bytes for every layer behind.
        ratio: share of the cost that is removed, between 0 and 1, both excluded.
        of: the cost: `multiply_adds` or `parameters` of the whole model, or its `latency` measured on the
            target.
        labels: whether the loss of masks is that of the data's labels; False: that of labels drawn from what
            the model itself predicts (for another loss than `cross_entropy`, of random directions of its
            output), as it always is for `refit`.
        examples: of the training data that gradients are taken of, at least 32, in whole batches.
        batch_size: examples in one backward pass, at least 1.
        round_to: neurons stay in multiples of this; a narrower layer stays whole.
        rearrange: whether sets are settled by the whole Fisher matrix of the masks of each layer; False: by
            its diagonal. Of the criterion `masks` only.
        target: where `latency` is measured.

    >>> PruneTransformer(0.3, criterion="masks").examples
    512
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    ratio: float = Field(gt=0, lt=1)
    criterion: Literal["masks", "refit"] = "refit"
    of: Literal["multiply_adds", "parameters", "latency"] = "multiply_adds"
    labels: bool = True
    examples: int = Field(default=512, ge=LEAST_EXAMPLES, le=1_000_000)
    batch_size: int = Field(default=32, ge=1)
    round_to: int = Field(default=16, ge=1, le=1024)
    rearrange: bool = True
    target: Target = Field(default_factory=Target)

    def __init__(self, ratio: float, **fields: Any) -> None:
        super().__init__(**{"ratio": ratio, **fields})


@dataclass(frozen=True)
class Judged:
    """What a group may be cut to.

    Attributes:
        group: of units that go together.
        widths: that it may have, ascending, the last the whole group.
        order: units from the one that stays longest to the one that goes first.
        losses: by width.
        matrix: what removed units lose together; sets are settled by it. None: the order is all.
    """

    group: Group
    widths: Units
    order: Units
    losses: Floats
    matrix: Floats | None = None

    def kept(self, choice: int) -> Units:
        """Return the units that stay at one of the widths, sorted."""
        units = np.sort(self.order[: self.widths[choice]])
        if self.matrix is None or len(units) == self.group.size:
            return units
        return rearrange(units, self.matrix, self.group.blocks)


@dataclass(frozen=True)
class _Cut:
    """What is cut, and how: the same for every step from the groups to the smaller model."""

    model: Model
    method: PruneTransformer
    context: Context
    groups: Groups
    layers: tuple[Layer, ...]


@handles(PruneTransformer, "torch")
def prune_transformer(model: Model, method: PruneTransformer, context: Context) -> Outcome:
    """Choose and cut; one change for every linear layer and convolution that the plan covers.

    Raises:
        Refused: too few examples, gradients that are not finite, or a share that cannot be removed.
    """
    if len(context.task.train) < LEAST_EXAMPLES:
        raise Refused(
            f"must have at least {LEAST_EXAMPLES} examples to judge units by",
            value=len(context.task.train),
            place="task.train",
            fix="give more training data, or use PruneChannels",
        )
    backend = context.backend
    groups = backend.groups(model, context.task.valid.example())
    cut = _Cut(model, method, context, groups, backend.layers(model))
    reasons = {group.name: _why_left_out(group, cut) for group in groups.groups}
    chosen = [group for group in groups.groups if not reasons[group.name]]
    judged = _judge(cut, chosen)
    for group in chosen:
        if group.name not in judged:
            reasons[group.name] = "a layer that takes its units is not called as a module on one input"
    result, kept = _choose_and_cut(cut, judged) if judged else (model, Kept())
    for name in judged:
        if name not in kept:
            reasons[name] = "all its units matter more than those that go"
    layers = cut.layers, backend.layers(result)
    told = reasons_by_layer(groups, reasons)
    return Outcome(result, width_changes(method, layers, groups, told, context.covers))


def _why_left_out(group: Group, cut: _Cut) -> str:
    """Say why a group may not shrink; empty if it may."""
    if outside := why_uncovered(group, cut.context.covers):
        return outside
    by_name = {layer.name: layer for layer in cut.layers}
    ends = [by_name[name] for name in (*group.layers, *(slot.layer for slot in consumers(group)))]
    if group.kind == "head" or (group.kind == "channel" and all(map(_is_pointwise, ends))):
        return ""
    return "its units are neither attention heads nor neurons between two linear layers"


def _is_pointwise(layer: Layer) -> bool:
    if layer.window is not None:
        return set(layer.window.kernel) == {1} and layer.window.groups == 1
    return layer.kind == "linear"


# In which order the units of each group go, and what each width loses: two ways to judge.


def _judge(cut: _Cut, groups: list[Group]) -> dict[str, Judged]:
    """Judge groups by the method's criterion; those with a layer that is not called as a module are missing.

    Raises:
        Refused: gradients that are not finite.
    """
    if not groups:
        return {}
    by_criterion = _judge_by_refit if cut.method.criterion == "refit" else _judge_by_masks
    layers = list(dict.fromkeys(slot.layer for group in groups for slot in consumers(group)))
    return by_criterion(cut, groups, layers, _sample(cut))


def _sample(cut: _Cut) -> Sample:
    method, task, loss = cut.method, cut.context.task, cut.context.task.loss
    if method.criterion == "masks" and not method.labels:
        from penjing.backends.torch.curvature.own_labels import OwnLabels

        loss = OwnLabels(loss, cut.context.seed)
    size = min(method.batch_size, method.examples)
    return Sample(task.train, loss, method.examples // size, size, cut.context.seed)


def _judge_by_masks(
    cut: _Cut, groups: list[Group], layers: Sequence[str], sample: Sample
) -> dict[str, Judged]:
    """Judge by the Fisher information of masks (Kwon et al. 2022)."""
    found = mask_gradients(groups, _backend(cut).gate_gradients(cut.model, layers, sample))
    _refuse_not_finite({name: [g] for name, g in found.items() if g is not None})
    judged = {}
    for group in groups:
        gradients = found[group.name]
        if gradients is None:
            continue
        matrix, widths = fisher(gradients), _widths(group, cut.method)
        importance = np.diagonal(matrix)
        order = ranked(importance, group.blocks)
        losses = losses_of_widths(importance, order, widths)
        together = matrix if cut.method.rearrange else None
        judged[group.name] = Judged(group, widths, order, losses, together)
    return judged


def _judge_by_refit(
    cut: _Cut, groups: list[Group], layers: Sequence[str], sample: Sample
) -> dict[str, Judged]:
    """Judge by what is lost once the layers behind are refitted (Kurtic et al. 2023)."""
    found = _backend(cut).kronecker_factors(cut.model, layers, sample)
    _refuse_not_finite({name: [f.inputs, f.slopes] for name, f in found.items()})
    judged = {}
    for group in groups:
        slots, widths = consumers(group), _widths(group, cut.method)
        if not all(slot.layer in found for slot in slots):
            continue
        weights = [cut.context.backend.read(cut.model, slot.layer)["weight"] for slot in slots]
        takers = [consumer_of(w, slot, found[slot.layer]) for w, slot in zip(weights, slots, strict=True)]
        order, losses = surgeon(takers, group.blocks, widths)
        judged[group.name] = Judged(group, widths, order, losses)
    return judged


def _backend(cut: _Cut) -> GradientBackend:
    backend = cut.context.backend
    assert isinstance(backend, GradientBackend)
    return backend


def _widths(group: Group, method: PruneTransformer) -> Units:
    return width_options(group.size, group.blocks, 1 if group.kind == "head" else method.round_to)


def _refuse_not_finite(arrays: Mapping[str, Sequence[Floats]]) -> None:
    bad = [name for name, parts in arrays.items() if not all(np.isfinite(part).all() for part in parts)]
    if bad:
        raise Refused(
            "must have finite gradients",
            value=f"NaN or infinite ones for {', '.join(bad[:5])}",
            place="the loss on task.train",
            fix="look for a loss or a target that is NaN or infinite",
        )


# What every width of every group costs: probed on truly cut models, one class of like groups at a time.


def _cost_table(cut: _Cut, judged: Mapping[str, Judged], meter: Meter) -> tuple[float, dict[str, Floats]]:
    """Return what the model costs with every group at its narrowest, and what each width adds to that.

    Groups whose layers have the same shapes and multiply-adds cost the same: a probe cuts all of such a class
    together, so that what they add stands out of the noise of a clock.

    Returns:
        A share of the uncut model's cost, and by group name shares `[widths]`, ascending from 0.
    """
    base, added = 1.0, dict[str, Floats]()
    for alike in _classes_of_like_groups(cut, [found.group for found in judged.values()], meter):
        widths = judged[alike[0].name].widths
        count = PROBES + 1 if cut.method.of == "latency" else 2
        places = np.unique(np.linspace(0, len(widths) - 1, count).astype(int))
        probed = []
        for width in widths[places[:-1]]:
            kept = {g.name: np.sort(ranked(np.zeros(g.size), g.blocks)[:width]) for g in alike}
            probed.append(meter.share(cut.context.backend.keep(cut.model, cut.groups, kept))[0])
        saved = np.interp(widths, widths[places], [*probed, 1.0]) - 1
        # A clock may say that a wider layer is faster; it is not counted on.
        rising = np.minimum.accumulate(np.minimum(saved, 0.0)[::-1])[::-1]
        base += float(rising[0])
        added |= {group.name: (rising - rising[0]) / len(alike) for group in alike}
    return base, added


def _classes_of_like_groups(cut: _Cut, groups: Sequence[Group], meter: Meter) -> list[list[Group]]:
    shapes, counts = {layer.name: layer.shapes for layer in cut.layers}, meter.dense.by_layer
    found: dict[object, list[Group]] = {}
    for group in groups:
        slots = tuple(
            (s.tensor, s.axis, s.role, shapes[s.layer][s.tensor], counts.get(s.layer, 0)) for s in group.slots
        )
        found.setdefault((group.kind, group.size, group.blocks.tobytes(), slots), []).append(group)
    return list(found.values())


# Widths of least loss at the cost that is allowed.


def _choose_and_cut(cut: _Cut, judged: Mapping[str, Judged]) -> tuple[Model, Kept]:
    """Return the model with the widths of least loss at the cost that is allowed, and what groups keep.

    Raises:
        Refused: the share cannot be removed.
    """
    from penjing.measurement.cost import open_meter

    method, best, probes = cut.method, None, list[Kept]()
    timed, allowed = method.of == "latency", 1 - method.ratio
    near, noise = (0.02, 0.01) if timed else (1e-3, 1e-9)
    with open_meter(cut.model, method.of, method.target, cut.context) as meter:
        base, added = _cost_table(cut, judged, meter)
        aim = allowed
        while aim >= base and len(probes) < ATTEMPTS:
            kept = _allocate(judged, added, aim - base)
            if any(_equal(kept, other) for other in probes):
                break
            probes.append(kept)
            smaller = cut.context.backend.keep(cut.model, cut.groups, kept)
            left = meter.share(smaller)[0]
            if left <= allowed + noise and (best is None or left > best[0]):
                best = left, smaller, kept
            if best is not None and (not timed or allowed - left <= near):
                break
            aim += allowed - left
    words = f"latency on {method.target.label}" if timed else method.of.replace("_", "-")
    if best is None:
        most = max(0.0, 1 - base)
        raise Refused(
            f"must be at most about {most:.3g}, the share of the {words} that can go",
            value=method.ratio,
            place="PruneTransformer.ratio",
            fix=f"ask for {most:.3g}, lower round_to, or cover more layers",
        )
    line = f"PruneTransformer left {best[0]:.1%} of the {words} ({method.ratio:.1%} was to go)"
    cut.context.notes.setdefault("pruning", []).append(line)
    return best[1], best[2]


def _allocate(judged: Mapping[str, Judged], added: Mapping[str, Floats], budget: float) -> Kept:
    """Choose widths within a budget, and which units stay; groups that stay whole are left out."""
    table = [Widths(found.widths, added[name], found.losses) for name, found in judged.items()]
    choices = zip(judged.items(), allocate(table, budget), strict=True)
    kept = {name: found.kept(choice) for (name, found), choice in choices}
    return {name: units for name, units in kept.items() if len(units) < judged[name].group.size}


def _equal(first: Kept, second: Kept) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)
