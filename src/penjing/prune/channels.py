"""Remove whole channels, so that the network truly shrinks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.scores import Tensors, l2_score, taylor_score
from penjing.arrays.selection import select
from penjing.core.backend import Backend, GradientBackend, Group, Groups, Layer
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Method, Model, Outcome, Stage, handles

_KINDS = ("conv", "depthwise", "linear")


class PruneChannels(Method):
    """Remove the same share of channels from every group of coupled layers.

    Channels go through residual adds, concatenation, BatchNorm, depthwise and grouped convolutions and
    flattening together (Fang et al. 2023); what cannot shrink is reported with the reason.

    Attributes:
        ratio: share of channels removed of each group, between 0 and 1, both excluded.
        score: `l2`, the norm of all weights of a channel (Li et al. 2017), or `taylor`, the squared
            first-order change of the loss without it (Molchanov et al. 2019), which needs gradients.
        round_to: what stays is a multiple of this many channels, at least one multiple; narrower groups
            stay whole.
        batches: batches of training data for `taylor`, at least 1.
        size: examples in each of them, at least 1.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    ratio: float = Field(gt=0, lt=1)
    score: Literal["l2", "taylor"] = "l2"
    round_to: int = Field(default=8, ge=1, le=1024)
    batches: int = Field(default=16, ge=1)
    size: int = Field(default=32, ge=1)

    def __init__(self, ratio: float, **fields: Any) -> None:
        super().__init__(**{"ratio": ratio, **fields})


@handles(PruneChannels)
def prune_channels(model: Model, method: PruneChannels, context: Context) -> Outcome:
    """Score, select and cut; one change for every convolution and linear layer that the plan covers."""
    backend = context.backend
    groups = backend.groups(model, context.task.valid.example())
    before = backend.layers(model)
    chosen = [g for g in groups.groups if all(context.covers(layer) for layer in g.layers)]
    scores = _scores(model, method, context, chosen, before)
    kept = {g.name: select(scores[g.name], method.ratio, g.blocks, method.round_to) for g in chosen}
    kept = {g.name: kept[g.name] for g in chosen if len(kept[g.name]) < g.size}
    result = backend.keep(model, groups, kept) if kept else model
    after = {layer.name: layer for layer in backend.layers(result)}
    reasons = _reasons(groups, kept, method, context)
    changes = []
    for layer in before:
        change = _change(layer, after[layer.name], reasons.get(layer.name, ""))
        if layer.kind in _KINDS and (change.done or context.covers(layer.name)):
            changes.append(change)
    return Outcome(result, changes)


def _scores(
    model: Model, method: PruneChannels, context: Context, groups: list[Group], layers: tuple[Layer, ...]
) -> dict[str, NDArray[np.float64]]:
    tensors = {layer.name: context.backend.read(model, layer.name) for layer in layers}
    if method.score == "l2":
        return {group.name: l2_score(group, tensors) for group in groups}
    return taylor_score(groups, tensors, _gradients(context.backend, model, method, context))


def _gradients(backend: Backend, model: Model, method: PruneChannels, context: Context) -> Iterator[Tensors]:
    if not isinstance(backend, GradientBackend):
        raise Refused("the score taylor has gradients", value=backend.name, place="PruneChannels.score",
                      fix="use score='l2', or prune before the model leaves its framework")  # fmt: skip
    task = context.task
    return backend.gradients(model, task.train, task.loss, method.batches, method.size, context.seed)


def _reasons(
    groups: Groups, kept: dict[str, NDArray[np.int64]], method: PruneChannels, context: Context
) -> dict[str, str]:
    """Say of every layer why its outputs stay, or why more stay than the ratio asks for."""
    reasons = {layer: f"frozen: {why}" for layer, why in groups.frozen.items()}
    for group in groups.groups:
        outside = [layer for layer in group.layers if not context.covers(layer)]
        for layer in group.layers:
            if outside:
                reasons.setdefault(
                    layer, f"coupled with layers that the plan does not cover: {', '.join(outside)}"
                )
            elif group.name not in kept:
                reasons.setdefault(
                    layer, f"{group.size} channels, rounded to a multiple of {method.round_to}, stay whole"
                )
            elif group.size * (1 - method.ratio) < len(kept[group.name]) / 2:
                reasons[layer] = f"the ratio would leave less than one multiple of {method.round_to} channels"
    return reasons


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
    shape = layer.shapes.get("weight", (0, 0))
    return shape[0], shape[1] if len(shape) > 1 else 0
