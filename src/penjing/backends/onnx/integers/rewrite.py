"""Replace the nodes of layers by others, one layer after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from penjing.backends.onnx.graph.edit import NodeWriter, copy_proto
from penjing.backends.onnx.graph.index import Graph
from penjing.backends.onnx.graph.layers import Facts, WeightNode, find_weight_nodes
from penjing.backends.onnx.integers.checks import compare_outputs, keep_first_changes, refuse_quantized
from penjing.backends.onnx.model import OnnxModel
from penjing.backends.onnx.normalize import normalize
from penjing.core.context import Context
from penjing.core.method import Changes, Outcome


class LayerRewriter(Protocol):
    """Writes another form of layers into the `NodeWriter` that it was made with."""

    def rewrite(self, entry: WeightNode) -> Facts:
        """Add the new form of a layer and return facts on it."""


def rewrite_layers(
    model: OnnxModel,
    method: str,
    context: Context,
    rewriter_of: Callable[[NodeWriter], LayerRewriter],
    reason_of: Callable[[Graph, WeightNode], str],
) -> Outcome:
    """Return the model with quantized layers, the float model as its reference, and a change for each.

    Outputs are compared on training examples where there are any.

    Args:
        model: in float.
        method: name of the method, for the changes.
        context: of the plan; says which layers are covered.
        rewriter_of: makes what writes the new form of layers, once for the graph.
        reason_of: says why a layer that is covered stays as it is; empty where it is rewritten.

    Raises:
        Refused: already quantized, or outputs that lost all meaning.
    """
    refuse_quantized(model)
    example = context.task.train.example() if len(context.task.train) else None
    float_model = normalize(model, example)
    graph = Graph(copy_proto(float_model.proto))
    entries = {entry.node.name: entry for entry in find_weight_nodes(graph) if entry.kind != "batchnorm"}
    writer, changes = NodeWriter(graph), Changes(method)
    rewriter = rewriter_of(writer)
    for node in graph.nodes:
        entry = entries.get(node.name)
        if entry is None:
            writer.nodes.append(node)
            continue
        reason = reason_of(graph, entry) if context.covers(entry.name) else "not covered by the pattern"
        if reason:
            writer.nodes.append(node)
            changes.skip(entry.name, reason)
        else:
            changes.done(entry.name, "", **rewriter.rewrite(entry))
    if not writer.arrays:
        return Outcome(model, keep_first_changes(changes))
    writer.write()
    result = OnnxModel(graph.proto, float_model.proto)
    if example is not None:
        changes.append(compare_outputs(method, float_model, result, context))
    return Outcome(result, keep_first_changes(changes))
