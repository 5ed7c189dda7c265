"""Replace the nodes of layers by others, one layer after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from penjing.backends.onnx.checks import compare_outputs, first_of_each, refuse_quantized
from penjing.backends.onnx.graph import (
    Graph,
    WeightNode,
    names_in,
    replace_constants,
    set_nodes,
    weight_nodes,
)
from penjing.backends.onnx.model import OnnxModel, copy_proto
from penjing.backends.onnx.normalize import normalize
from penjing.core.context import Context
from penjing.core.method import Change, Outcome


class LayerWriter(Protocol):
    """Collects the nodes and constants of the new graph."""

    nodes: list[Any]
    arrays: dict[str, Any]

    def rewrite(self, entry: WeightNode) -> dict[str, float | int | str]:
        """Add the new form of a layer and return facts on it."""


def rewrite_layers(
    model: OnnxModel,
    method: str,
    context: Context,
    writer_of: Callable[[Graph, set[str]], LayerWriter],
    reason_of: Callable[[Graph, WeightNode], str],
) -> Outcome:
    """Return the model with quantized layers, the float model as its reference, and a change for each.

    Outputs are compared on training examples where there are any.

    Args:
        model: in float.
        method: name of the method, for the changes.
        context: of the plan; says which layers are covered.
        writer_of: makes the writer for a graph and the names that are taken in it.
        reason_of: says why a layer that is covered stays as it is; empty where it is rewritten.

    Raises:
        Refused: already quantized, or outputs that lost all meaning.
    """
    refuse_quantized(model)
    example = context.task.train.example() if len(context.task.train) else None
    float_model = normalize(model, example)
    proto = copy_proto(float_model.proto)
    graph = Graph(proto)
    entries = {entry.node.name: entry for entry in weight_nodes(graph) if entry.kind != "batchnorm"}
    writer, changes = writer_of(graph, names_in(proto)), []
    for node in graph.nodes:
        entry = entries.get(node.name)
        if entry is None:
            writer.nodes.append(node)
            continue
        reason = reason_of(graph, entry) if context.covers(entry.name) else "not covered by the pattern"
        if reason:
            writer.nodes.append(node)
            changes.append(Change(method=method, layer=entry.name, status="skipped", reason=reason))
        else:
            facts = writer.rewrite(entry)
            changes.append(Change(method=method, layer=entry.name, status="done", detail=facts))
    if not writer.arrays:
        return Outcome(model, first_of_each(changes))
    replace_constants(proto, writer.arrays)
    set_nodes(proto, writer.nodes)
    known = {entry.domain for entry in proto.opset_import}
    for domain in {node.domain for node in writer.nodes if node.domain} - known:
        proto.opset_import.add(domain=domain, version=1)
    result = OnnxModel(proto, float_model.proto)
    if example is not None:
        changes.append(compare_outputs(method, float_model, result, context))
    return Outcome(result, first_of_each(changes))
