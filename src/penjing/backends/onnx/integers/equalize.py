"""Layers of an ONNX graph between which a scale can move, and graphs in which it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.equalization import Factors, Pair, scaled_inputs
from penjing.backends.onnx.graph.edit import copy_proto, replace_constants
from penjing.backends.onnx.graph.index import Graph, get_attribute
from penjing.backends.onnx.graph.layers import WeightNode
from penjing.backends.onnx.graph.shapes import infer_types
from penjing.backends.onnx.integers.placement import read_clip_bounds

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

THROUGH = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
)
"""Operators that work on each channel by itself and commute with factors above 0."""


class Stop(Exception):
    """Why a scale cannot move behind a layer."""


def find_pairs(graph: Graph, layers: Mapping[str, WeightNode]) -> tuple[list[Pair], dict[str, str]]:
    """Return the layers whose output can be scaled, in the order of the graph, and why others cannot.

    Args:
        graph: a normalized one.
        layers: by name, those that may change.
    """
    by_node = {entry.node.output[0]: entry for entry in layers.values()}
    shapes = {name: shape for name, (_, shape) in infer_types(graph.proto).items()}
    pairs, why = [], {}
    for name, entry in layers.items():
        try:
            channels = len(read_weight(graph, entry))
            found = _consumers(
                _Walk(graph, by_node, shapes, channels), entry.node.output[0], entry.output_axis
            )
            pairs.append(Pair(name, tuple(dict.fromkeys(found))))
        except Stop as stop:
            why[name] = str(stop)
    return pairs, why


@dataclass(frozen=True)
class _Walk:
    """What a walk behind a layer needs to know."""

    graph: Graph
    layers: Mapping[str, WeightNode]
    shapes: Mapping[str, tuple[int | None, ...] | None]
    channels: int


def _consumers(walk: _Walk, tensor: str, axis: int) -> list[str]:
    """Return the layers that take a tensor whose channels lie on an axis; raise `Stop` for anything else."""
    if tensor in walk.graph.outputs:
        raise Stop("its output is one of the model's")
    found = []
    for node in walk.graph.consumers.get(tensor, []):
        entry = walk.layers.get(node.output[0])
        if entry is not None and node.input[0] == tensor:
            if entry.output_axis != axis or count_input_channels(walk.graph, entry) != walk.channels:
                raise Stop(f"{entry.name} does not take its channels as they are")
            found.append(entry.name)
        elif node.input[0] == tensor and _passes(walk.graph, node):
            found += _consumers(walk, node.output[0], axis)
        elif node.op_type in ("Flatten", "Reshape", "Squeeze") and _is_row(walk, node.output[0]):
            found += _consumers(walk, node.output[0], -1)
        else:
            raise Stop(_obstacle(walk, node))
    if not found:
        raise Stop("nothing takes its output")
    return found


def _is_row(walk: _Walk, tensor: str) -> bool:
    """Tell whether a tensor that was reshaped has one value for each channel."""
    shape = walk.shapes.get(tensor)
    return shape is not None and len(shape) == 2 and shape[1] == walk.channels


def _passes(graph: Graph, node: NodeProto) -> bool:
    """Tell whether a node gives the same channels, scaled alike."""
    if node.op_type in THROUGH:
        return True
    if node.op_type != "Pad":
        return False
    if get_attribute(node, "mode", "constant") != "constant":
        return True
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = graph.array(node.input[2])
    return value is not None and not value.any()


def _obstacle(walk: _Walk, node: NodeProto) -> str:
    bounds = read_clip_bounds(walk.graph, node)
    if node.op_type == "Clip" and bounds is not None:
        return f"behind it values are cut off at {bounds[1]:g} (ReLU6), which a scale moves"
    return f"its output goes to {node.op_type}, which a scale does not pass"


def read_weight(graph: Graph, entry: WeightNode) -> NDArray[Any]:
    """Return a layer's weight, `[out, in / groups, *kernel]`."""
    array = graph.array(entry.node.input[1])
    assert array is not None
    return entry.canonical("weight", array)


def count_groups(entry: WeightNode) -> int:
    """Return the groups of a convolution; 1 for a linear layer."""
    return int(get_attribute(entry.node, "group", 1))


def count_input_channels(graph: Graph, entry: WeightNode) -> int:
    """Return how many channels a layer takes."""
    return int(read_weight(graph, entry).shape[1]) * count_groups(entry)


def owns_constants(graph: Graph, entry: WeightNode) -> bool:
    """Tell whether weight and bias are constants of the graph that no other node uses."""
    names = [name for name in entry.node.input[1:] if name]
    return all(name in graph.constants and graph.only_consumer(name) is not None for name in names)


def rescale_layers(
    proto: ModelProto, pairs: list[Pair], layers: Mapping[str, WeightNode], factors: Mapping[str, Factors]
) -> Any:
    """Return a copy of a graph whose layers are divided by the factors of their outputs, others multiplied.

    Args:
        proto: normalized; not changed.
        pairs, layers: from `pairs_of`.
        factors: by producer, `[out]`, above 0.
    """
    fresh = copy_proto(proto)
    graph = Graph(fresh)
    weights = {
        name: read_weight(graph, layers[name]).astype(np.float64)
        for pair in pairs
        for name in (pair.producer, *pair.consumers)
    }
    arrays = {}
    for pair in pairs:
        entry, factor = layers[pair.producer], factors[pair.producer]
        own = weights[pair.producer]
        weights[pair.producer] = own / factor.reshape(-1, *[1] * (own.ndim - 1))
        if "bias" in entry.tensors:
            bias = graph.array(entry.tensors["bias"])
            assert bias is not None
            arrays[entry.tensors["bias"]] = (bias / factor.reshape(bias.shape)).astype(bias.dtype)
        for name in pair.consumers:
            weights[name] = scaled_inputs(weights[name], factor, count_groups(layers[name]))
    for name, weight in weights.items():
        arrays[layers[name].tensors["weight"]] = layers[name].native("weight", weight).astype(np.float32)
    replace_constants(fresh, arrays)
    return fresh
