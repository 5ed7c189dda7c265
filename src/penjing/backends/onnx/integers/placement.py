"""Which nodes of a float graph work on integers, and which tensors need a grid for that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from penjing.backends.onnx.graph.index import Graph, get_attribute
from penjing.backends.onnx.graph.layers import WeightNode

if TYPE_CHECKING:
    from onnx import NodeProto

ARITHMETIC = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"})
"""Operators that ONNX Runtime fuses with the Q/DQ around them into an integer kernel of their own."""
MOVES = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad"}
)
"""Operators that move values; they work on the integers themselves and keep the grid."""


@dataclass
class Placement:
    """The roles of nodes, by name of their first output.

    Attributes:
        compute: layers whose product runs on integers.
        arithmetic: other operators with an integer kernel.
        moves: operators that pass integers on.
        clips: Relu and Clip that work on integers.
        absorbed: output of a producer to the Relu or Clip that its grid replaces.
        grids: tensors that get a grid of their own, in the order of the graph.
        refused: layers that were asked for but have no integer kernel, with the reason.
    """

    compute: dict[str, WeightNode] = field(default_factory=dict)
    arithmetic: set[str] = field(default_factory=set)
    moves: set[str] = field(default_factory=set)
    clips: set[str] = field(default_factory=set)
    absorbed: dict[str, NodeProto] = field(default_factory=dict)
    grids: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def final(self, tensor: str) -> str:
        """Return the tensor that a producer's grid stands for: behind the Relu that it absorbed."""
        return self.absorbed[tensor].output[0] if tensor in self.absorbed else tensor

    def grid_source(self, graph: Graph, tensor: str) -> str:
        """Return the tensor whose grid another has: itself, or what operators that keep grids made it of."""
        while tensor not in self.grids:
            node = graph.producer.get(tensor)
            if node is None or node.output[0] not in self.moves | self.clips:
                break
            tensor = node.input[0]
        return tensor

    def saturates(self, graph: Graph, tensor: str, low: float, high: float) -> bool:
        """Tell whether a grid with these ends does the work of the Relu or Clip that it absorbs, if any."""
        node = graph.producer.get(tensor)
        if node is None or not any(absorbed is node for absorbed in self.absorbed.values()):
            return True
        bounds, half_a_step = read_clip_bounds(graph, node), (high - low) / 510
        return bounds is not None and bounds[0] - half_a_step <= low and high <= bounds[1] + half_a_step

    def integer_nodes(self) -> set[str]:
        """First outputs of all nodes that need no float kernel."""
        absorbed = {node.output[0] for node in self.absorbed.values()}
        return set(self.compute) | self.arithmetic | self.moves | self.clips | absorbed


def find_obstacle(graph: Graph, entry: WeightNode) -> str | None:
    """Return why a layer cannot run on integers in ONNX Runtime on CPU, or None if it can."""
    node = entry.node
    if entry.kind == "embedding":
        return "a table of integers is made float at every call, several hundred times slower"
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return f"no integer kernel for {node.op_type}"
    weight = graph.array(node.input[1])
    assert weight is not None
    if weight.dtype != np.float32:
        return f"the weight is {weight.dtype}, not float32"
    if node.op_type == "MatMul" and weight.ndim != 2:
        return "the weight is a stack of matrices"
    if node.op_type == "Gemm" and any(get_attribute(node, key, 1.0) != 1 for key in ("alpha", "beta")):
        return "alpha and beta are not 1"
    if node.op_type == "Gemm" and get_attribute(node, "transA", 0):
        return "the input is transposed"
    if len(node.input) > 2 and node.input[2]:
        bias = graph.array(node.input[2])
        if bias is None or bias.size != entry.canonical("weight", weight).shape[0]:
            return "the bias is not one constant for every channel"
    return None


def place_quantizers(graph: Graph, layers: Collection[WeightNode]) -> Placement:
    """Choose what runs on integers: the given layers, and what lies between them and can follow.

    A convolution hands integers on; a matrix product gives floats, unless a layer behind it wants
    integers. An operator between follows if all that flows into it is, or will be, on a grid.
    """
    result = Placement()
    for entry in layers:
        reason = find_obstacle(graph, entry)
        if reason is None:
            result.compute[entry.node.output[0]] = entry
        else:
            result.refused[entry.name] = reason
    wanted = {entry.node.input[0] for entry in result.compute.values()}
    made: set[str] = set()
    grids: dict[str, None] = {}
    for node in graph.nodes:
        _place_node(graph, node, result, wanted, made, grids)
    for entry in result.compute.values():
        if entry.node.input[0] not in made or entry.node.input[0] in grids:
            grids.setdefault(entry.node.input[0])
    position = {name: i for i, node in enumerate(graph.nodes) for name in node.output}
    result.grids = sorted(grids, key=lambda name: position.get(name, -1))
    return result


def _place_node(
    graph: Graph, node: NodeProto, result: Placement, wanted: set[str], made: set[str], grids: dict[str, None]
) -> None:
    out = node.output[0]
    if out in made or any(absorbed is node for absorbed in result.absorbed.values()):
        return
    flowing = [name for name in node.input if name]
    ready = wanted | made
    if out in result.compute:
        _absorb(graph, out, result, must=node.op_type == "Conv", wanted=wanted)
        if node.op_type == "Conv" or result.final(out) in wanted:
            _hand_on(result.final(out), made, grids)
    elif node.op_type in ARITHMETIC and set(flowing) <= ready and made & set(flowing):
        result.arithmetic.add(out)
        grids.update(dict.fromkeys(name for name in flowing if name not in made))
        _absorb(graph, out, result, must=True, wanted=wanted)
        _hand_on(result.final(out), made, grids)
    elif node.op_type in MOVES and flowing[0] in made and _moves_integers(graph, node):
        result.moves.add(out)
        made.update(name for name in node.output if name)
    elif flowing[:1] and flowing[0] in made and _saturates(graph, node):
        result.clips.add(out)
        made.add(out)


def _hand_on(tensor: str, made: set[str], grids: dict[str, None]) -> None:
    made.add(tensor)
    grids.setdefault(tensor)


def _absorb(graph: Graph, tensor: str, result: Placement, must: bool, wanted: set[str]) -> None:
    """Let the grid behind a Relu or Clip do its work: a grid saturates at the ends of its range."""
    after = graph.only_consumer(tensor)
    if after is None or not _saturates(graph, after):
        return
    if must or after.output[0] in wanted:
        result.absorbed[tensor] = after


def _saturates(graph: Graph, node: NodeProto) -> bool:
    """Tell whether a node is a Relu or Clip whose bounds the ends of a grid can stand for."""
    return node.op_type in ("Relu", "Clip") and read_clip_bounds(graph, node) is not None


def read_clip_bounds(graph: Graph, node: NodeProto) -> tuple[float, float] | None:
    """Return the constant bounds of a Relu or Clip that hold 0 between them, or None."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = []
    for index, default in ((1, float("-inf")), (2, float("inf"))):
        name = node.input[index] if len(node.input) > index else ""
        array = graph.array(name) if name else np.asarray(default)
        if array is None or array.size != 1:
            return None
        bounds.append(float(array.reshape(-1)[0]))
    return (bounds[0], bounds[1]) if bounds[0] <= 0 <= bounds[1] else None


def _moves_integers(graph: Graph, node: NodeProto) -> bool:
    if node.op_type == "MaxPool":
        return len([name for name in node.output if name]) == 1
    if node.op_type != "Pad":
        return True
    fill = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    return get_attribute(node, "mode", "constant") != "constant" or (fill is not None and not fill.any())
