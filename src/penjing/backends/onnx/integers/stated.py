"""Which layers a graph states in integers, and how far two executions of such a graph may be apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from penjing.backends.onnx.graph.index import Graph
from penjing.backends.onnx.graph.layers import find_weight_nodes
from penjing.backends.onnx.model import OnnxModel, make_feed, open_session, run_session
from penjing.core.backend import Arrays

if TYPE_CHECKING:
    from onnx import ModelProto

STEP = 1 / 255
"""One step of an 8-bit integer, relative to its range."""

_INTEGER_PRODUCTS = ("MatMulInteger", "ConvInteger")


def find_integer_layers(proto: ModelProto) -> dict[str, str]:
    """Return the layers whose product is stated in integers: by name, the name of the node.

    Stated means: an operator on integers, or a float operator both of whose operands come from
    `DequantizeLinear`, which a runtime may carry out on the integers. A node without a name goes by that of
    its output, as runtimes call it.
    """
    graph = Graph(proto)
    found: dict[str, str] = {}
    for entry in find_weight_nodes(graph):
        node = entry.node
        sources = [graph.producer.get(name) for name in node.input[:2]]
        stated = all(s is not None and s.op_type == "DequantizeLinear" for s in sources)
        if node.op_type in _INTEGER_PRODUCTS or (stated and entry.kind in ("conv", "depthwise", "linear")):
            found.setdefault(entry.name, node.name or node.output[0])
    return found


def measure_rounding_noise(model: OnnxModel, inputs: Arrays) -> float:
    """Return how far apart two legal executions of an integer graph may be on one batch.

    In ONNX Runtime once on the integers and once as written, in float between the roundings: a value that
    falls on the border of two integers may go either way, and the layers behind carry it on. Another runtime
    also rounds in other places, between fused operators: that is worth a step of 8 bits.

    Returns:
        a step and the largest difference of the first outputs, relative to the largest output; 0 without
        integers.
    """
    if not find_integer_layers(model.proto):
        return 0.0
    session = open_session(model.proto, "basic")
    plain = np.asarray(run_session(session, None, make_feed(session, inputs))[0], np.float64)
    fused = np.asarray(model.run(inputs)[0], np.float64)
    scale = float(np.abs(plain).max(initial=0.0))
    return STEP + (float(np.abs(fused - plain).max(initial=0.0)) / scale if scale else 0.0)
