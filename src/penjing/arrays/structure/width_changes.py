"""What is said of every layer of a model whose groups of units were cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from penjing.core.backend import Group, Groups, Layer
from penjing.core.method import Changes, Method

_WEIGHTED = ("conv", "depthwise", "linear")


def why_uncovered(group: Group, covers: Callable[[str], bool]) -> str:
    """Say that a group cannot be cut for a layer that the plan leaves out; empty where it covers all."""
    outside = [layer for layer in group.layers if not covers(layer)]
    return f"coupled with layers that the plan does not cover: {', '.join(outside)}" if outside else ""


def reasons_by_layer(groups: Groups, by_group: Mapping[str, str]) -> dict[str, str]:
    """Return for every layer the reason why its outputs stay; `by_group` has those of groups."""
    reasons = {layer: f"frozen: {why}" for layer, why in groups.frozen.items()}
    for group in groups.groups:
        for layer in group.layers:
            if by_group.get(group.name):
                reasons.setdefault(layer, by_group[group.name])
    return reasons


def width_changes(
    method: Method,
    layers: tuple[tuple[Layer, ...], tuple[Layer, ...]],
    groups: Groups,
    reasons: Mapping[str, str],
    covers: Callable[[str], bool],
) -> Changes:
    """Return a change for every convolution and linear layer that the plan covers or that lost inputs.

    Other layers (embeddings, attention in one module) are listed where they shrank.

    Args:
        method: that cut.
        layers: before the cut and after it.
        groups: of the model before the cut.
        reasons: by layer, why its outputs stay, or are other than asked for.
        covers: tells whether the plan covers a layer.
    """
    before, after = layers[0], {layer.name: layer for layer in layers[1]}
    turned, changes = _turned(groups), Changes(method)
    for layer in before:
        old, new = (_widths(x, layer.name in turned) for x in (layer, after[layer.name]))
        detail = {"out_before": old[0], "out_after": new[0], "in_before": old[1], "in_after": new[1]}
        reason = reasons.get(layer.name, "")
        if old != new:
            changes.done(layer.name, reason, **detail)
        elif layer.kind in _WEIGHTED and covers(layer.name):
            changes.skip(layer.name, reason, **detail)
    return changes


def _turned(groups: Groups) -> set[str]:
    """Return the layers whose weight has inputs on its first axis (transposed convolutions, tables)."""
    slots = [slot for group in groups.groups for slot in group.slots if slot.tensor == "weight"]
    return {slot.layer for slot in slots if slot.axis == (0 if slot.role == "in" else 1)}


def _widths(layer: Layer, turned: bool) -> tuple[int, int]:
    """Return outputs and inputs of a layer's largest matrix; 0, 0 where it has none."""
    matrices = [shape for shape in layer.shapes.values() if len(shape) > 1]
    shape = max(matrices, key=prod, default=(0, 0))
    return (shape[1], shape[0]) if turned else (shape[0], shape[1])
