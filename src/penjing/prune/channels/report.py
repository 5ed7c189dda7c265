"""What was done to every layer, or why it was not."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores import SCORES
from penjing.core.backend import Group, Groups, Layer
from penjing.core.context import Context
from penjing.core.method import Change
from penjing.prune.channels.method import PruneChannels

_KINDS = ("conv", "depthwise", "linear")


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


def why_width(group: Group, kept: Mapping[str, NDArray[np.int64]], method: PruneChannels) -> str:
    """Say why a scored group keeps all units, or more than the ratio asks for; nothing otherwise."""
    width = len(kept.get(group.name, range(group.size)))
    uniform = method.of == "units" and method.selection == "local"
    if width == group.size:
        if uniform or group.size <= method.round_to:
            return f"{group.size} {group.kind}s, rounded to a multiple of {method.round_to}, stay whole"
        return f"all {group.size} {group.kind}s rank above those that go"
    if not uniform or group.size * (1 - method.ratio) >= width / 2:
        return ""
    floor = method.floor_of(group.layers)
    if width > method.round_to and width - method.round_to < floor * group.size:
        return f"the floor keeps {floor:.0%} of the {group.kind}s"
    return f"the ratio would leave less than one multiple of {method.round_to} channels"


def by_layer(groups: Groups, by_group: Mapping[str, str]) -> dict[str, str]:
    """Return for every layer the reason why its outputs stay; `by_group` has those of groups."""
    reasons = {layer: f"frozen: {why}" for layer, why in groups.frozen.items()}
    for group in groups.groups:
        for layer in group.layers:
            if by_group.get(group.name):
                reasons.setdefault(layer, by_group[group.name])
    return reasons


def changes(
    before: tuple[Layer, ...], after: tuple[Layer, ...], reasons: Mapping[str, str], context: Context
) -> list[Change]:
    """Return a change for every convolution and linear layer that the plan covers or that lost inputs.

    Other layers (embeddings, attention in one module) are listed where they shrank.
    """
    new = {layer.name: layer for layer in after}
    found = []
    for layer in before:
        change = _change(layer, new[layer.name], reasons.get(layer.name, ""))
        if change.done or (layer.kind in _KINDS and context.covers(layer.name)):
            found.append(change)
    return found


def _change(before: Layer, after: Layer, reason: str) -> Change:
    (out, columns), (new_out, new_columns) = _widths(before), _widths(after)
    detail: dict[str, float | int | str] = {
        "out_before": out, "out_after": new_out, "in_before": columns, "in_after": new_columns,
    }  # fmt: skip
    done = (out, columns) != (new_out, new_columns)
    return Change(
        method="PruneChannels", layer=before.name, status="done" if done else "skipped",
        reason=reason, detail=detail,
    )  # fmt: skip


def _widths(layer: Layer) -> tuple[int, int]:
    """Return rows and columns of a layer's largest matrix; 0, 0 where it has none."""
    matrices = [shape for shape in layer.shapes.values() if len(shape) > 1]
    largest = layer.shapes.get("weight") if layer.kind in _KINDS else max(matrices, key=prod, default=None)
    return (0, 0) if largest is None or len(largest) < 2 else (largest[0], largest[1])
