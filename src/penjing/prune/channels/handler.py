"""Score, select and cut."""

from __future__ import annotations

from typing import Any

from penjing.arrays.scores import SCORES
from penjing.arrays.structure.ranking import Bounds, Kept, Ranking, bounds, classes, smallest_cut
from penjing.core.backend import Group, Groups, Heads, Layer
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model
from penjing.prune.channels import report
from penjing.prune.channels.constraint import prices, quantity_of, reach, units_left
from penjing.prune.channels.method import PruneChannels
from penjing.prune.channels.scoring import refuse_too_little_data, score_groups


@handles(PruneChannels)
def prune_channels(model: Model, method: PruneChannels, context: Context) -> Outcome:
    """Score, select and cut; one change for every convolution and linear layer that the plan covers.

    Raises:
        Refused: too little data for the score, a score that the backend has not, or a share that cannot be
            removed.
    """
    refuse_too_little_data(method, context)
    _note_earlier_cuts(model, context)
    groups, before = _groups(model, method, context), context.backend.layers(model)
    by_group = {g.name: report.why_left_out(g, method, context) for g in groups.groups}
    chosen = [group for group in groups.groups if not by_group[group.name]]
    result = model
    if chosen:
        scores = score_groups(model, method, context, chosen, before)
        by_group |= {g.name: report.why_unscored(method) for g in chosen if g.name not in scores}
        scored = [group for group in chosen if group.name in scores]
        if method.of != "units" and method.selection != "local" and SCORES[method.score].loss:
            costs = prices(model, method, context, scored, before)
            scores = {name: scores[name] / costs[name] for name in scores}
        ranking = _ranking(scored, scores, method, before)
        result, kept = _cut(model, method, context, (groups, ranking, before))
        for group in scored:
            width = len(kept.get(group.name, range(group.size)))
            by_group[group.name] = report.why_width(group, width, _allowed(group, method), method)
    reasons = report.by_layer(groups, by_group)
    return Outcome(result, report.changes(before, context.backend.layers(result), groups, reasons, context))


def _groups(model: Model, method: PruneChannels, context: Context) -> Groups:
    heads: Heads = "width" if method.units == ("head width",) else "whole"
    return context.backend.groups(model, context.task.valid.example(), heads)


def _ranking(
    groups: list[Group], scores: dict[str, Any], method: PruneChannels, layers: tuple[Layer, ...]
) -> Ranking:
    kinds = {layer.name: layer.kind for layer in layers}
    allowed = {group.name: _allowed(group, method) for group in groups}
    return Ranking(classes(groups, kinds, method.selection), scores, allowed)


def _allowed(group: Group, method: PruneChannels) -> Bounds:
    floor, ceiling = method.floor_of(group.layers), method.ceiling_of(group.layers)
    return bounds(group, method.round_to, floor, ceiling)


def _cut(
    model: Model, method: PruneChannels, context: Context, parts: tuple[Groups, Ranking, tuple[Layer, ...]]
) -> tuple[Model, Kept]:
    """Return the model without what the ratio asks for, and what every group keeps."""
    groups, ranking, layers = parts
    backend, place = context.backend, "PruneChannels.ratio"
    if not ranking.groups:
        return model, {}

    def cut(kept: Kept) -> Model:
        return backend.keep(model, groups, kept) if kept else model

    if method.of != "units":
        with quantity_of(model, method, context, groups, layers) as quantity:
            found = reach(ranking, quantity, cut, method.ratio, place)
        _note(context, f"PruneChannels left {found.how} ({method.ratio:.1%} was to go)")
        return found.model, found.kept
    if method.selection == "local":
        kept = ranking.kept(method.ratio)
    else:
        left = units_left(ranking)
        kept = smallest_cut(ranking, left, 1 - method.ratio)
        if left(kept) > 1 - method.ratio + 1e-9:
            raise Refused(
                "the share can be removed",
                value=method.ratio,
                place=place,
                fix=f"ask for at most {1 - left(kept):.3g}, or lower the floor",
            )
    return cut(kept), kept


def _note_earlier_cuts(model: Model, context: Context) -> None:
    if context.backend.name != "torch":
        return
    from penjing.backends.torch.structure.history import history

    steps = len(history(model))
    if steps:
        _note(
            context,
            f"PruneChannels found a model that was cut before ({steps} steps): shares are of what it is now",
        )


def _note(context: Context, line: str) -> None:
    context.notes.setdefault("pruning", []).append(line)
