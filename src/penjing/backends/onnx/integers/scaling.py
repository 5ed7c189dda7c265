"""Divide channels of an ONNX graph's tensors, and multiply the weights that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.backends.onnx.graph.edit import NodeWriter, copy_proto
from penjing.backends.onnx.graph.index import Graph, get_attribute
from penjing.backends.onnx.graph.layers import WeightNode

if TYPE_CHECKING:
    from onnx import ModelProto

Floats = NDArray[np.float32]


def divide_channels(
    proto: ModelProto, factors: Mapping[str, Floats], layers: Mapping[str, Sequence[WeightNode]]
) -> ModelProto:
    """Return a copy of a normalized graph that computes the same with divided tensors.

    Args:
        proto: the graph; it is not changed.
        factors: by tensor, one for each channel of its last axis, above 0.
        layers: by tensor, the linear layers that take it divided; what else takes it gets it as it was.
    """
    fresh = copy_proto(proto)
    graph = Graph(fresh)
    writer = NodeWriter(graph, graph.nodes)
    for tensor, factor in factors.items():
        members = {entry.node.name for entry in layers[tensor]}
        takers = graph.consumers[tensor]
        nodes = [node for node in takers if node.name in members]
        if len(nodes) < len(takers) or not _absorb(writer, tensor, factor):
            divided = writer.claim_name(f"{tensor}_smooth")
            inverse = writer.add_constant(f"{tensor}_factors", (1 / factor).astype(np.float32))
            writer.add_node("Mul", [tensor, inverse], [divided], before=nodes[0])
            for node in nodes:
                node.input[0] = divided
        for entry in layers[tensor]:
            _multiply(writer, entry, factor)
    writer.write()
    return fresh


def _absorb(writer: NodeWriter, tensor: str, factor: Floats) -> bool:
    """Divide what the node in front gives, in its own constants, and tell whether it could be done."""
    graph = writer.graph
    node = graph.producer.get(tensor)
    if node is None or tensor in graph.outputs:
        return False
    if node.op_type in ("Relu", "LeakyRelu"):
        # Factors are above 0 and go through.
        return graph.only_consumer(node.input[0]) is not None and _absorb(writer, node.input[0], factor)
    if node.op_type == "LayerNormalization":
        if get_attribute(node, "axis", -1) != -1:
            return False
        names = [name for name in node.input[1:3] if name]
    elif node.op_type == "Add":
        products = [graph.producer.get(name) for name in node.input]
        product = next((p for p in products if p is not None and p.op_type == "MatMul"), None)
        others = [name for name in node.input if name in graph.constants]
        if product is None or len(others) != 1 or graph.only_consumer(product.output[0]) is None:
            return False
        names = [product.input[1], *others]
    elif node.op_type in ("MatMul", "Gemm"):
        names = [name for name in node.input[1:] if name]
    else:
        return False
    plain = all(name in graph.constants and graph.only_consumer(name) is not None for name in names)
    if not plain:
        return False
    turned = node.op_type == "Gemm" and get_attribute(node, "transB", 0)
    fresh = {}
    for name in names:
        array = _current(writer, name)
        rows = bool(turned) and array.ndim == 2
        if array.ndim == 0 or array.shape[0 if rows else -1] != len(factor):
            return False
        fresh[name] = (array / (factor.reshape(-1, 1) if rows else factor)).astype(array.dtype)
    writer.arrays.update(fresh)
    return True


def _current(writer: NodeWriter, name: str) -> NDArray[Any]:
    array = writer.arrays[name] if name in writer.arrays else writer.graph.array(name)
    assert array is not None
    return array


def _multiply(writer: NodeWriter, entry: WeightNode, factor: Floats) -> None:
    """Multiply the input channels of a layer's weight; one that others use too gets a copy."""
    graph, name = writer.graph, entry.node.input[1]
    weight = entry.canonical("weight", _current(writer, name)) * factor
    node = next(n for n in graph.nodes if n.name == entry.node.name)
    if graph.only_consumer(name) is None:
        name = writer.claim_name(f"{name.removesuffix('.weight')}_smooth.weight")
        node.input[1] = name
    writer.arrays[name] = entry.native("weight", weight).astype(np.float32)
