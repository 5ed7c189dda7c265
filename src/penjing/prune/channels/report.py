"""What was done to every layer, or why it was not."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from penjing.arrays.scores import SCORES
from penjing.arrays.structure.ranking import Bounds
from penjing.arrays.structure.selection import kept_width
from penjing.core.backend import Group, Groups, Layer
from penjing.core.context import Context
from penjing.core.method import Change
from penjing.prune.channels.method import PruneChannels

_KINDS = ("conv", "depthwise", "linear")
_UNITS = {"head width": "positions in heads", "hidden": "hidden channels"}


def why_left_out(group: Group, method: PruneChannels, context: Context) -> str:
    """Say why a group may not shrink, before anything is scored; nothing if it may."""
    outside = [layer for layer in group.layers if not context.covers(layer)]
    if outside:
        return f"coupled with layers that the plan does not cover: {', '.join(outside)}"
    if group.kind not in method.units:
        return f"its units are of the kind {group.kind!r}, which PruneChannels.units does not name"
    return ""


def why_unscored(method: PruneChannels) -> str:
    """Say why a group has no score."""
    return f"no score {method.score}: {SCORES[method.score].absent}"


def why_width(group: Group, width: int, allowed: Bounds, method: PruneChannels) -> str:
    """Say why a scored group keeps all units, or more or fewer than the ratio asks for; nothing otherwise."""
    units = _UNITS.get(group.kind, f"{group.kind}s")
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


def by_layer(groups: Groups, by_group: Mapping[str, str]) -> dict[str, str]:
    """Return for every layer the reason why its outputs stay; `by_group` has those of groups."""
    reasons = {layer: f"frozen: {why}" for layer, why in groups.frozen.items()}
    for group in groups.groups:
        for layer in group.layers:
            if by_group.get(group.name):
                reasons.setdefault(layer, by_group[group.name])
    return reasons


def changes(
    before: tuple[Layer, ...],
    after: tuple[Layer, ...],
    groups: Groups,
    reasons: Mapping[str, str],
    context: Context,
) -> list[Change]:
    """Return a change for every convolution and linear layer that the plan covers or that lost inputs.

    Other layers (embeddings, attention in one module) are listed where they shrank.
    """
    new, turned = {layer.name: layer for layer in after}, _turned(groups)
    found = []
    for layer in before:
        change = _change(layer, new[layer.name], layer.name in turned, reasons.get(layer.name, ""))
        if change.done or (layer.kind in _KINDS and context.covers(layer.name)):
            found.append(change)
    return found


def _turned(groups: Groups) -> set[str]:
    """Return the layers whose weight has inputs on its first axis (transposed convolutions, tables)."""
    slots = [slot for group in groups.groups for slot in group.slots if slot.tensor == "weight"]
    return {slot.layer for slot in slots if slot.axis == (0 if slot.role == "in" else 1)}


def _change(before: Layer, after: Layer, turned: bool, reason: str) -> Change:
    (out, columns), (new_out, new_columns) = _widths(before, turned), _widths(after, turned)
    detail: dict[str, float | int | str] = {
        "out_before": out,
        "out_after": new_out,
        "in_before": columns,
        "in_after": new_columns,
    }
    done = (out, columns) != (new_out, new_columns)
    return Change(
        method="PruneChannels",
        layer=before.name,
        status="done" if done else "skipped",
        reason=reason,
        detail=detail,
    )


def _widths(layer: Layer, turned: bool) -> tuple[int, int]:
    """Return outputs and inputs of a layer's largest matrix; 0, 0 where it has none."""
    matrices = [shape for shape in layer.shapes.values() if len(shape) > 1]
    shape = max(matrices, key=prod, default=(0, 0))
    return (shape[1], shape[0]) if turned else (shape[0], shape[1])
