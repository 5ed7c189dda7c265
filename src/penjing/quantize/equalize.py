"""Cross-layer equalization: channels of weights brought to one range, the network computing the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from penjing.arrays.equalization import equalizing_factors, precision
from penjing.core.context import Context
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles

if TYPE_CHECKING:
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.model import OnnxModel


class EqualizeWeights(Method):
    """Move scales between layers until the channels of their weights have like ranges on both sides.

    What a convolution or linear layer gives is divided channel by channel, and what takes it behind a ReLU, a
    pooling or nothing multiplies: the network computes the same, and one grid for a whole weight or a whole
    activation no longer serves one wide channel at the cost of all others. Needs no data. Nagel et al. 2019,
    "Data-free quantization through weight equalization and bias correction". In front of `Int8Static`.

    Attributes:
        sweeps: over all pairs of layers, at most, at least 1; they end where the ranges are settled.

    >>> EqualizeWeights(sweeps=20).sweeps
    20
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    sweeps: int = Field(default=100, ge=1, le=10_000)


@handles(EqualizeWeights, "onnx")
def equalize_weights(model: OnnxModel, method: EqualizeWeights, context: Context) -> Outcome:
    """Return the model with equalized weights, and a change for each convolution and linear layer.

    Raises:
        Refused: already quantized, or folding BatchNorm changes outputs.
    """
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import find_weight_nodes
    from penjing.backends.onnx.integers.checks import keep_first_changes, refuse_quantized
    from penjing.backends.onnx.integers.equalize import count_groups, find_pairs, read_weight, rescale_layers
    from penjing.backends.onnx.model import OnnxModel
    from penjing.backends.onnx.normalize import normalize

    refuse_quantized(model)
    normal = normalize(model, context.task.train.example() if len(context.task.train) else None)
    graph = Graph(normal.proto)
    layers: dict[str, WeightNode] = {}
    why: dict[str, str] = {}
    for entry in find_weight_nodes(graph):
        if entry.kind in ("conv", "depthwise", "linear"):
            why[entry.name] = _excluded(graph, entry, context)
            if not why[entry.name]:
                layers[entry.name] = entry
    pairs, reasons = find_pairs(graph, layers)
    why |= reasons
    weights = {name: read_weight(graph, entry) for name, entry in layers.items()}
    groups = {name: count_groups(entry) for name, entry in layers.items()}
    factors = equalizing_factors(pairs, weights, groups, method.sweeps)
    proto = rescale_layers(normal.proto, pairs, layers, factors)
    after = Graph(proto)
    partners: dict[str, list[str]] = {}
    for pair in pairs:
        for consumer in pair.consumers:
            partners.setdefault(pair.producer, []).append(consumer)
            partners.setdefault(consumer, []).append(pair.producer)
    changes = Changes(method)
    for name, reason in why.items():
        if name not in partners:
            changes.skip(name, reason)
            continue
        before, now = precision(weights[name]), precision(read_weight(after, layers[name]))
        together = {"with": ", ".join(partners[name])}
        changes.done(name, **together, precision_before=before, precision_after=now)
    return Outcome(OnnxModel(proto, normal.reference) if pairs else model, keep_first_changes(changes))


def _excluded(graph: Graph, entry: WeightNode, context: Context) -> str:
    """Say why a layer stays as it is; empty where it may change."""
    from penjing.backends.onnx.integers.equalize import owns_constants
    from penjing.backends.onnx.integers.placement import find_obstacle

    if not context.covers(entry.name):
        return "not covered by the pattern"
    if not owns_constants(graph, entry):
        return "its weight or bias is another layer's too"
    return find_obstacle(graph, entry) or ""
