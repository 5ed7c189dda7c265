"""An index over an ONNX graph, and its layers with weights in the canonical layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from penjing.core.backend import Window

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
    """

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.nodes: list[Any] = list(proto.graph.node)
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.outputs: tuple[str, ...] = tuple(value.name for value in proto.graph.output)
        self.inputs: tuple[str, ...] = tuple(
            value.name for value in proto.graph.input if value.name not in self.constants
        )
        self.producer: dict[str, Any] = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[Any]] = {}
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
        q, scale = (self.array(part) for part in node.input[:2])
        if q is None or scale is None:
            return None
        shape = [1] * q.ndim
        if scale.ndim:
            shape[attribute(node, "axis", 1) % q.ndim] = -1
        real: NDArray[Any] = q.astype(np.float32) * scale.reshape(shape)
        return real

    def stored(self, name: str) -> Any | None:
        """Return the tensor proto behind a constant, through DequantizeLinear; None if not constant."""
        node = self.producer.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            name = node.input[0]
        return self.constants.get(name)

    def flows(self, node: Any) -> bool:
        """Tell whether a node takes anything that is computed from the inputs, or an input itself."""
        return any(name in self.producer or name in self.inputs for name in node.input)

    def only_consumer(self, name: str) -> Any | None:
        """Return the node that alone takes a tensor, or None; graph outputs have a consumer outside."""
        found = self.consumers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None


def taken_by(node: Any) -> list[str]:
    """Return the names of all tensors that a node takes, those of the graphs inside it too."""
    return [*node.input, *_captured(node)]


def _captured(node: Any) -> list[str]:
    """Names that the graphs inside a node (If, Loop, Scan) may take from the outside."""
    inner = [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]
    names: list[str] = []
    for graph in inner:
        for child in graph.node:
            names.extend(child.input)
            names.extend(_captured(child))
        names.extend(value.name for value in graph.output)
    return names


def attribute(node: Any, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or the default where it is not set."""
    for entry in node.attribute:
        if entry.name == name:
            value = onnx.helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


@dataclass(frozen=True)
class WeightNode:
    """A node with a constant weight.

    Attributes:
        name: name of the layer: the weight's without `.weight`, or the node's.
        kind: `conv`, `depthwise`, `linear`, `batchnorm`, `embedding` or `other`.
        node: the node itself.
        tensors: canonical name of each tensor to its name in the graph.
        to_canonical: permutation of the weight's axes to `[out, in, *kernel]`.
    """

    name: str
    kind: str
    node: Any
    tensors: dict[str, str]
    to_canonical: tuple[int, ...] = field(default=())

    def canonical(self, key: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor in the canonical layout."""
        return np.ascontiguousarray(array.transpose(self.to_canonical)) if self._moves(key) else array

    def native(self, key: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor in the layout of the graph."""
        back = np.argsort(self.to_canonical) if self._moves(key) else ()
        return np.ascontiguousarray(array.transpose(back)) if self._moves(key) else array

    @property
    def output_axis(self) -> int:
        """Axis of the output that holds the channels."""
        return 1 if self.node.op_type in ("Conv", "ConvTranspose", "BatchNormalization") else -1

    def _moves(self, key: str) -> bool:
        return key == "weight" and self.to_canonical != ()


def weight_nodes(graph: Graph) -> list[WeightNode]:
    """List the nodes with constant weights, in the order of the graph.

    Two nodes that share a weight have the same layer name.
    """
    found = [_weight_node(graph, node) for node in graph.nodes]
    return [entry for entry in found if entry is not None]


_BATCHNORM = ("weight", "bias", "running_mean", "running_var")


def _weight_node(graph: Graph, node: Any) -> WeightNode | None:
    if node.op_type == "BatchNormalization":
        names = dict(zip(_BATCHNORM, node.input[1:5], strict=True))
        return WeightNode(_layer_name(graph, node, node.input[1]), "batchnorm", node, names)
    if node.op_type == "Gather":
        table = graph.stored(node.input[0])
        if table is None or len(table.dims) != 2 or table.data_type not in FLOATS:
            return None
        return WeightNode(
            _layer_name(graph, node, node.input[0]), "embedding", node, {"weight": node.input[0]}
        )
    if (
        node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger")
        or len(node.input) < 2
    ):
        return None
    weight = graph.stored(node.input[1])
    if weight is None or len(weight.dims) < 2:
        return None
    tensors = {"weight": node.input[1]}
    if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2 and node.input[2]:
        tensors["bias"] = node.input[2]
    kind, order = _kind_and_layout(node, tuple(weight.dims))
    return WeightNode(_layer_name(graph, node, node.input[1]), kind, node, tensors, order)


def _kind_and_layout(node: Any, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if node.op_type == "Conv":
        depthwise = attribute(node, "group", 1) == shape[0] and shape[1] == 1 < shape[0]
        return ("depthwise" if depthwise else "conv"), ()
    if node.op_type == "ConvTranspose":
        return "conv", (1, 0, *range(2, len(shape)))
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return "linear", ()
    return "linear", (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)


def window_of(entry: WeightNode, shape: Sequence[int]) -> Window | None:
    """Return how a convolution with a weight of this shape reads its input; None for what is none.

    None too where the padding depends on the input's size (`auto_pad`).
    """
    node, rank = entry.node, len(shape) - 2
    if node.op_type != "Conv" or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    pads = attribute(node, "pads", [0] * 2 * rank)
    sides = tuple((int(a), int(b)) for a, b in zip(pads[:rank], pads[rank:], strict=True))
    steps = (tuple(int(s) for s in attribute(node, name, [1] * rank)) for name in ("strides", "dilations"))
    stride, dilation = steps
    return Window(tuple(shape[2:]), stride, sides, dilation, int(attribute(node, "group", 1)))


def _layer_name(graph: Graph, node: Any, weight: str) -> str:
    source = graph.producer.get(weight)
    weight = source.input[0] if source is not None else weight
    weight = weight.removesuffix("_quantized")
    return weight.removesuffix(".weight") if weight.endswith(".weight") else (node.name or weight)


def name_weights(proto: Any) -> None:
    """Give weights of linear layers their module's name where PyTorch's exporter lost it, in place.

    The exporter stores the transposed weight of a linear layer on more than two axes as `val_7`. The
    module's name is that of the bias which is added next, or noted beside the node.
    """
    graph, taken = Graph(proto), names_in(proto)
    for node in graph.nodes:
        old = node.input[1] if node.op_type == "MatMul" else ""
        if old not in graph.constants or old.endswith(".weight"):
            continue
        module = _module_of_bias(graph, node) or _noted_module(node)
        name = f"{module}.weight"
        if not module or name in taken:
            continue
        taken.add(name)
        graph.constants[old].name = name
        graph.constants[name] = graph.constants.pop(old)
        for user in graph.consumers[old]:
            for index, used in enumerate(user.input):
                if used == old:
                    user.input[index] = name


def _module_of_bias(graph: Graph, node: Any) -> str:
    after = graph.only_consumer(node.output[0])
    if after is None or after.op_type != "Add":
        return ""
    bias = next((name for name in after.input if name in graph.constants), "")
    return bias.removesuffix(".bias") if bias.endswith(".bias") else ""


def _noted_module(node: Any) -> str:
    notes = {entry.key.rpartition(".")[2]: entry.value for entry in node.metadata_props}
    path, kinds = (re.findall(r"'([^']*)'", notes.get(k, "")) for k in ("name_scopes", "class_hierarchy"))
    linear = len(path) > 1 and len(kinds) > 1 and kinds[-2].endswith(".Linear")
    return path[-2] if linear else ""


def unique(wanted: str, taken: set[str]) -> str:
    """Return a name that is not taken, and take it.

    >>> unique("a", {"a", "a_1"})
    'a_2'
    """
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def names_in(proto: Any) -> set[str]:
    """Return every tensor name that a graph uses."""
    graph = proto.graph
    names = {value.name for values in (graph.input, graph.output, graph.initializer) for value in values}
    return names | {name for node in graph.node for name in (*node.input, *node.output)}


def replace_constants(proto: Any, arrays: dict[str, NDArray[Any]]) -> None:
    """Set initializers by name, in place; new ones are appended."""
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, array in arrays.items():
        fresh = numpy_helper.from_array(np.asarray(array, order="C"), name)
        if name in known:
            known[name].CopyFrom(fresh)
        else:
            proto.graph.initializer.append(fresh)


def set_nodes(proto: Any, nodes: Sequence[Any]) -> None:
    """Replace the nodes of the main graph, and drop the constants and shapes that nothing uses then."""
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    del proto.graph.value_info[:]
    used = {name for node in kept for name in taken_by(node)}
    used |= {value.name for value in proto.graph.output}
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)


def shapes_and_types(proto: Any) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
    """Infer for every tensor its ONNX element type and its shape (None for what is not known)."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    found: dict[str, tuple[int, tuple[int | None, ...] | None]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        found[value.name] = (tensor.elem_type, tuple(dims) if tensor.HasField("shape") else None)
    return found
