"""An index over an ONNX graph: who makes a tensor, who takes it, and what is constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

QUANTIZED_OPERATORS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "MatMulNBits",
    }
)

FLOATS = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
)


class Graph:
    """Producers, consumers and constants of a model's main graph, by tensor name.

    It reads the proto and does not follow later edits; make another after editing.

    >>> from onnx import TensorProto, helper
    >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    >>> proto = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))
    >>> Graph(proto).producer["y"].op_type
    'Relu'
    """

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.nodes: list[NodeProto] = list(proto.graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.outputs: tuple[str, ...] = tuple(value.name for value in proto.graph.output)
        self.inputs: tuple[str, ...] = list_inputs(proto)
        self.producer: dict[str, NodeProto] = {
            name: node for node in self.nodes for name in node.output if name
        }
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)
            for name in _captured(node):
                self.consumers.setdefault(name, []).append(node)

    def array(self, name: str) -> NDArray[Any] | None:
        """Return a copy of a constant, through DequantizeLinear where there is one; None if not constant."""
        stored = self.stored(name)
        if stored is None:
            return None
        if name in self.constants:
            return np.array(numpy_helper.to_array(stored))
        node = self.producer[name]
        q, scale, zero = (self.array(part) for part in (*node.input, "", "")[:3])
        return None if q is None or scale is None else _dequantize(node, q, scale, zero)

    def stored(self, name: str) -> TensorProto | None:
        """Return the tensor proto behind a constant, through DequantizeLinear; None if not constant."""
        node = self.producer.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            name = node.input[0]
        return self.constants.get(name)

    def flows(self, node: NodeProto) -> bool:
        """Tell whether a node takes anything that is computed from the inputs, or an input itself."""
        return any(name in self.producer or name in self.inputs for name in node.input)

    def only_consumer(self, name: str) -> NodeProto | None:
        """Return the node that alone takes a tensor, or None; graph outputs have a consumer outside."""
        found = self.consumers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None


def _dequantize(
    node: NodeProto, q: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any] | None
) -> NDArray[Any]:
    """Return (q - zero) * scale, with a scale for the tensor, for each index of an axis, or each block."""
    axis = get_attribute(node, "axis", 1) % max(q.ndim, 1)
    block = get_attribute(node, "block_size", 0)

    def spread(part: NDArray[Any]) -> NDArray[Any]:
        if block and part.ndim == q.ndim:
            return np.repeat(part, block, axis)[tuple(slice(size) for size in q.shape)]
        return part.reshape([-1 if i == axis else 1 for i in range(q.ndim)]) if part.ndim else part

    shifted = q.astype(np.float32) if zero is None else q.astype(np.float32) - spread(zero)
    real: NDArray[Any] = (shifted * spread(scale)).astype(scale.dtype)
    return real


def list_inputs(proto: ModelProto) -> tuple[str, ...]:
    """Return the names of the inputs that a caller gives: initializers listed as inputs are none."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return tuple(value.name for value in proto.graph.input if value.name not in constants)


def list_node_inputs(node: NodeProto) -> list[str]:
    """Return the names of all tensors that a node takes, those of the graphs inside it too."""
    return [*node.input, *_captured(node)]


def _captured(node: NodeProto) -> list[str]:
    """Names that the graphs inside a node (If, Loop, Scan) may take from the outside."""
    inner = [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]
    names: list[str] = []
    for graph in inner:
        for child in graph.node:
            names.extend(child.input)
            names.extend(_captured(child))
        names.extend(value.name for value in graph.output)
    return names


def walk_nodes(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Yield every node of a graph or function, and of the graphs inside its nodes."""
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                stack.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)


def get_attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or the default where it is not set."""
    for entry in node.attribute:
        if entry.name == name:
            value = onnx.helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def read_opset(proto: ModelProto) -> int:
    """Return the version of the standard operators that a model imports; 0 for none."""
    return max(
        (int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0
    )


def find_integer_operator(proto: ModelProto) -> str | None:
    """Return the name of the first integer operator of a model, or None for a float model."""
    return next((node.op_type for node in proto.graph.node if node.op_type in QUANTIZED_OPERATORS), None)
