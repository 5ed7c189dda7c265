"""Divide channels of an ONNX graph's tensors, and multiply the weights that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from penjing.backends.onnx.graph import (
    Graph,
    WeightNode,
    attribute,
    names_in,
    replace_constants,
    set_nodes,
    unique,
)
from penjing.backends.onnx.model import copy_proto

Floats = NDArray[np.float32]


def divide(proto: Any, factors: Mapping[str, Floats], layers: Mapping[str, Sequence[WeightNode]]) -> Any:
    """Return a copy of a normalized graph that computes the same with divided tensors.

    Args:
        factors: by tensor, one for each channel of its last axis, above 0.
        layers: by tensor, the linear layers that take it divided; what else takes it gets it as it was.
    """
    fresh = copy_proto(proto)
    graph, taken = Graph(fresh), names_in(fresh)
    arrays: dict[str, Any] = {}
    inserted: dict[str, Any] = {}
    for tensor, factor in factors.items():
        members = {entry.node.name for entry in layers[tensor]}
        nodes = [node for node in graph.consumers[tensor] if node.name in members]
        if len(nodes) < len(graph.consumers[tensor]) or not _absorb(graph, tensor, factor, arrays):
            divided, inverse = unique(f"{tensor}_smooth", taken), unique(f"{tensor}_factors", taken)
            arrays[inverse] = (1 / factor).astype(np.float32)
            name = unique(f"{tensor}_smoothing", taken)
            inserted[tensor] = helper.make_node("Mul", [tensor, inverse], [divided], name=name)
            for node in nodes:
                node.input[0] = divided
        for entry in layers[tensor]:
            _multiply(graph, entry, factor, arrays, taken)
    replace_constants(fresh, arrays)
    set_nodes(fresh, _placed(graph, inserted))
    return fresh


def _placed(graph: Graph, inserted: Mapping[str, Any]) -> list[Any]:
    """Return the nodes with each new one behind what makes its tensor."""
    nodes = [inserted[name] for name in graph.inputs if name in inserted]
    for node in graph.nodes:
        nodes.append(node)
        nodes += [inserted[name] for name in node.output if name in inserted]
    return nodes


def _absorb(graph: Graph, tensor: str, factor: Floats, arrays: dict[str, Any]) -> bool:
    """Divide what the node in front gives, in its own constants, and tell whether it could be done."""
    node = graph.producer.get(tensor)
    if node is None or tensor in graph.outputs:
        return False
    if node.op_type in ("Relu", "LeakyRelu"):
        # Factors are above 0 and go through.
        return graph.only_consumer(node.input[0]) is not None and _absorb(
            graph, node.input[0], factor, arrays
        )
    if node.op_type == "LayerNormalization":
        if attribute(node, "axis", -1) != -1:
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
    turned = node.op_type == "Gemm" and attribute(node, "transB", 0)
    fresh = {}
    for name in names:
        array = _current(graph, name, arrays)
        rows = bool(turned) and array.ndim == 2
        if array.ndim == 0 or array.shape[0 if rows else -1] != len(factor):
            return False
        fresh[name] = (array / (factor.reshape(-1, 1) if rows else factor)).astype(array.dtype)
    arrays.update(fresh)
    return True


def _current(graph: Graph, name: str, arrays: Mapping[str, Any]) -> Any:
    array = arrays[name] if name in arrays else graph.array(name)
    assert array is not None
    return array


def _multiply(
    graph: Graph, entry: WeightNode, factor: Floats, arrays: dict[str, Any], taken: set[str]
) -> None:
    """Multiply the input channels of a layer's weight; one that others use too gets a copy."""
    name = entry.node.input[1]
    weight = entry.canonical("weight", _current(graph, name, arrays)) * factor
    node = next(n for n in graph.nodes if n.name == entry.node.name)
    if graph.only_consumer(name) is None:
        name = unique(f"{name.removesuffix('.weight')}_smooth.weight", taken)
        node.input[1] = name
    arrays[name] = entry.native("weight", weight).astype(np.float32)
