"""Units judged, widths under a constraint, and the cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores import consumers
from penjing.arrays.structure.mask_search import Widths, allocate, width_options
from penjing.core.backend import Group, Groups, Layer
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Outcome
from penjing.core.registry import handles
from penjing.core.value import Model
from penjing.prune.transformer.cost import clock, cost_table
from penjing.prune.transformer.judging import Judged, judge
from penjing.prune.transformer.method import LEAST_EXAMPLES, PruneTransformer

ATTEMPTS = 5
_WEIGHTED = ("conv", "depthwise", "linear")
Floats = NDArray[np.float64]
Kept = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class _Search:
    """What the choice of widths needs; `judged` by the names of the groups that may be cut."""

    model: Model
    method: PruneTransformer
    context: Context
    groups: Groups
    judged: Mapping[str, Judged]


@handles(PruneTransformer, "torch")
def prune_transformer(model: Model, method: PruneTransformer, context: Context) -> Outcome:
    """Choose and cut; one change for every linear layer and convolution that the plan covers.

    Raises:
        Refused: too few examples, gradients that are not finite, or a share that cannot be removed.
    """
    if len(context.task.train) < LEAST_EXAMPLES:
        raise Refused(
            f"masks have at least {LEAST_EXAMPLES} examples",
            value=len(context.task.train),
            place="task.train",
            fix="give more training data, or use PruneChannels",
        )
    backend = context.backend
    groups, before = backend.groups(model, context.task.valid.example()), backend.layers(model)
    reasons = {group.name: _why_left_out(group, before, context) for group in groups.groups}
    chosen = [group for group in groups.groups if not reasons[group.name]]
    judged = judge(model, method, context, {g.name: _widths(g, method) for g in chosen}, chosen)
    for group in chosen:
        if group.name not in judged:
            reasons[group.name] = "a layer that takes its units is not called as a module on one input"
    result, kept = model, Kept()
    if judged:
        result, kept = _cut(_Search(model, method, context, groups, judged))
    for name in judged:
        if name not in kept:
            reasons[name] = "all its units matter more than those that go"
    return Outcome(result, _changes(before, backend.layers(result), _by_layer(groups, reasons), context))


def _why_left_out(group: Group, layers: tuple[Layer, ...], context: Context) -> str:
    outside = [layer for layer in group.layers if not context.covers(layer)]
    if outside:
        return f"coupled with layers that the plan does not cover: {', '.join(outside)}"
    if group.kind == "head":
        return ""
    by_name = {layer.name: layer for layer in layers}
    ends = [by_name[name] for name in (*group.layers, *(slot.layer for slot in consumers(group)))]
    if group.kind == "channel" and all(map(_is_pointwise, ends)):
        return ""
    return "its units are neither attention heads nor neurons between two linear layers"


def _is_pointwise(layer: Layer) -> bool:
    if layer.window is not None:
        return set(layer.window.kernel) == {1} and layer.window.groups == 1
    return layer.kind == "linear"


def _widths(group: Group, method: PruneTransformer) -> NDArray[np.int64]:
    return width_options(group.size, group.blocks, 1 if group.kind == "head" else method.round_to)


def _cut(search: _Search) -> tuple[Model, Kept]:
    """Return the model with the widths of least loss at the cost that is allowed, and what groups keep."""
    ratio, best, probes = search.method.ratio, None, list[Kept]()
    with clock(search.model, search.method, search.context) as measured:
        options = {name: judged.widths for name, judged in search.judged.items()}
        base, added = cost_table(search.model, search.groups, options, measured, search.context)
        aim = 1 - ratio
        while aim >= base and len(probes) < ATTEMPTS:
            kept = _kept(search, added, aim - base)
            if any(_same(kept, other) for other in probes):
                break
            probes.append(kept)
            cut = search.context.backend.keep(search.model, search.groups, kept)
            left = measured.share(cut)
            if left <= 1 - ratio + measured.noise and (best is None or left > best[0]):
                best = left, cut, kept
            if best is not None and (measured.linear or 1 - ratio - left <= measured.near):
                break
            aim += 1 - ratio - left
    if best is None:
        raise Refused(
            "the share can be removed",
            value=ratio,
            place="PruneTransformer.ratio",
            fix=f"ask for at most about {max(0.0, 1 - base):.3g} of the {measured.words}, lower "
            "round_to, or cover more layers",
        )
    line = f"PruneTransformer left {best[0]:.1%} of the {measured.words} ({ratio:.1%} was to go)"
    search.context.notes.setdefault("pruning", []).append(line)
    return best[1], best[2]


def _kept(search: _Search, added: Mapping[str, Floats], budget: float) -> Kept:
    """Choose widths within a budget, and which units stay; groups that stay whole are left out."""
    table = {
        name: Widths(judged.widths, added[name], judged.losses) for name, judged in search.judged.items()
    }
    choices = zip(search.judged.items(), allocate(list(table.values()), budget), strict=True)
    kept = {name: judged.kept(choice) for (name, judged), choice in choices}
    return {name: units for name, units in kept.items() if len(units) < search.judged[name].group.size}


def _same(first: Kept, second: Kept) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)


def _by_layer(groups: Groups, by_group: Mapping[str, str]) -> dict[str, str]:
    reasons = {layer: f"frozen: {why}" for layer, why in groups.frozen.items()}
    for group in groups.groups:
        for layer in group.layers:
            if by_group[group.name]:
                reasons.setdefault(layer, by_group[group.name])
    return reasons


def _changes(
    before: tuple[Layer, ...], after: tuple[Layer, ...], reasons: Mapping[str, str], context: Context
) -> list[Change]:
    """Return a change for every layer whose shapes changed, and for the others that could have shrunk."""
    new, found = {layer.name: layer for layer in after}, []
    for layer in before:
        done = layer.shapes != new[layer.name].shapes
        if not done and not (layer.kind in _WEIGHTED and context.covers(layer.name)):
            continue
        detail: dict[str, float | int | str] = {}
        for moment, shapes in (("before", layer.shapes), ("after", new[layer.name].shapes)):
            matrix = max(shapes.values(), key=prod)
            rows, columns = (*matrix, 1)[:2]
            detail |= {f"out_{moment}": rows, f"in_{moment}": columns}
        status: Literal["done", "skipped"] = "done" if done else "skipped"
        found.append(
            Change(
                method="PruneTransformer",
                layer=layer.name,
                status=status,
                reason=reasons.get(layer.name, ""),
                detail=detail,
            )
        )
    return found
