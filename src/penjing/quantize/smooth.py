"""Smooth activations in front of 8-bit linear layers, the weights taking up what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.smoothing import Smoothing, smoothing
from penjing.calibration.settings import Examples
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles

if TYPE_CHECKING:
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.model import OnnxModel

ROWS = 1024
"""Rows of each activation that strengths are tried on."""
BATCH = 32

Floats = NDArray[np.float32]


class SmoothActivations(Method):
    """Divide the channels of activations by factors that the weights behind are multiplied by.

    A linear layer computes the same, but a few channels with large values no longer coarsen the one grid that
    all share. Xiao et al. 2023, "SmoothQuant"; here the strength is chosen for each activation, by the error
    of the rounded products on training data, and an activation that gains less than `gain` is left alone.
    The division becomes part of the normalization or linear layer in front where nothing else takes its
    output, else an operator of its own. In front of `Int8Static`.

    Attributes:
        examples: training examples that activations are seen on, at least 1.
        gain: share of a product's squared error that smoothing has to take away, in [0, 1).

    >>> SmoothActivations(examples=64).gain
    0.1
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    examples: Examples = 256
    gain: float = Field(default=0.1, ge=0, lt=1)


@dataclass(frozen=True)
class _Seen:
    """What calibration saw of one activation: some rows, and each channel's largest magnitude."""

    rows: Floats
    largest: Floats


@handles(SmoothActivations, "onnx")
def smooth_activations(model: OnnxModel, method: SmoothActivations, context: Context) -> Outcome:
    """Return the model with smoothed activations, and a change for every linear layer.

    Raises:
        Refused: already quantized, no data, or NaN or infinite activations.
    """
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import find_weight_nodes
    from penjing.backends.onnx.integers.checks import keep_first_changes, refuse_quantized
    from penjing.backends.onnx.integers.placement import find_obstacle
    from penjing.backends.onnx.integers.scaling import divide_channels
    from penjing.backends.onnx.model import OnnxModel
    from penjing.backends.onnx.normalize import normalize

    refuse_quantized(model)
    normal = normalize(model, context.task.train.example() if len(context.task.train) else None)
    graph, changes = Graph(normal.proto), Changes(method)
    groups: dict[str, list[WeightNode]] = {}
    for entry in find_weight_nodes(graph):
        reason = None if context.covers(entry.name) else "not covered by the pattern"
        if entry.kind != "linear":
            reason = "its input is no row of channels"
        reason = reason or find_obstacle(graph, entry)
        if reason is None:
            groups.setdefault(entry.node.input[0], []).append(entry)
        elif entry.kind not in ("batchnorm", "embedding"):
            changes.skip(entry.name, reason)
    seen = _observed(normal, list(groups), method, context)
    factors = {}
    for tensor, entries in groups.items():
        found = smoothing(
            seen[tensor].rows, seen[tensor].largest, [_weight(graph, e) for e in entries], method.gain
        )
        if found.strength:
            factors[tensor] = found.factors
        for entry in entries:
            _report(entry.name, found, changes)
    if not factors:
        return Outcome(model, keep_first_changes(changes))
    proto = divide_channels(normal.proto, factors, {tensor: groups[tensor] for tensor in factors})
    return Outcome(OnnxModel(proto, normal.reference), keep_first_changes(changes))


def _weight(graph: Graph, entry: WeightNode) -> NDArray[np.floating]:
    array = graph.array(entry.node.input[1])
    assert array is not None
    return entry.canonical("weight", array)


def _observed(
    model: OnnxModel, tensors: Sequence[str], method: SmoothActivations, context: Context
) -> dict[str, _Seen]:
    """Walk over training data once, keeping as many rows of each batch as make up `ROWS`."""
    from penjing.backends.onnx.integers.calibrate import Watcher, iterate_calibration

    watcher, rng = Watcher(model.proto, tensors), np.random.default_rng(context.seed)
    size = min(BATCH, watcher.batch_size(context.task.train.example())) if len(context.task.train) else BATCH
    share = max(1, ROWS * size // method.examples)
    kept: dict[str, list[Floats]] = {name: [] for name in tensors}
    largest: dict[str, Floats] = {}
    for inputs in iterate_calibration(context.task.train, method.examples, size, context.seed):
        for name, value in watcher.values(inputs).items():
            rows = np.asarray(value, np.float32).reshape(-1, value.shape[-1])
            if not np.isfinite(rows).all():
                raise Refused(
                    "must be finite",
                    value="NaN or infinite values",
                    place=f"the activation {name!r}",
                    fix="look for overflow in the layers before it, and at the training data",
                )
            widest = np.abs(rows).max(axis=0)
            largest[name] = np.maximum(largest.get(name, widest), widest)
            kept[name].append(rows[rng.permutation(len(rows))[:share]])
    return {name: _Seen(np.concatenate(rows), largest[name]) for name, rows in kept.items()}


def _report(layer: str, found: Smoothing, changes: Changes) -> None:
    detail = {"strength": found.strength, "error_before": found.before, "error_after": found.after}
    if found.strength:
        changes.done(layer, **detail)
    else:
        changes.skip(layer, "smoothing gains too little here", **detail)
