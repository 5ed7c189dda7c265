"""The layers of an ONNX graph: nodes with constant weights, in the canonical layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.backends.onnx.graph.edit import list_names
from penjing.backends.onnx.graph.index import FLOATS, Graph, get_attribute
from penjing.core.backend import Window

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Facts = dict[str, float | int | str]
"""What a method tells of one layer in the report."""


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
    node: NodeProto
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


def find_weight_nodes(graph: Graph) -> list[WeightNode]:
    """List the nodes with constant weights, in the order of the graph.

    Two nodes that share a weight have the same layer name.
    """
    found = [_weight_node(graph, node) for node in graph.nodes]
    return [entry for entry in found if entry is not None]


_BATCHNORM = ("weight", "bias", "running_mean", "running_var")


def _weight_node(graph: Graph, node: NodeProto) -> WeightNode | None:
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


def _kind_and_layout(node: NodeProto, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if node.op_type == "Conv":
        depthwise = get_attribute(node, "group", 1) == shape[0] and shape[1] == 1 < shape[0]
        return ("depthwise" if depthwise else "conv"), ()
    if node.op_type == "ConvTranspose":
        return "conv", (1, 0, *range(2, len(shape)))
    if node.op_type == "Gemm" and get_attribute(node, "transB", 0):
        return "linear", ()
    return "linear", (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)


def read_window(entry: WeightNode, shape: Sequence[int]) -> Window | None:
    """Return how a convolution with a weight of this shape reads its input; None for what is none.

    None too where the padding depends on the input's size (`auto_pad`).
    """
    node, rank = entry.node, len(shape) - 2
    if node.op_type != "Conv" or get_attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    pads = get_attribute(node, "pads", [0] * 2 * rank)
    sides = tuple((int(a), int(b)) for a, b in zip(pads[:rank], pads[rank:], strict=True))
    steps = (
        tuple(int(s) for s in get_attribute(node, name, [1] * rank)) for name in ("strides", "dilations")
    )
    stride, dilation = steps
    return Window(tuple(shape[2:]), stride, sides, dilation, int(get_attribute(node, "group", 1)))


def _layer_name(graph: Graph, node: NodeProto, weight: str) -> str:
    source = graph.producer.get(weight)
    weight = source.input[0] if source is not None else weight
    weight = weight.removesuffix("_quantized")
    return weight.removesuffix(".weight") if weight.endswith(".weight") else (node.name or weight)


def restore_weight_names(proto: ModelProto) -> None:
    """Give weights of linear layers their module's name where PyTorch's exporter lost it, in place.

    The exporter stores the transposed weight of a linear layer on more than two axes as `val_7`. The
    module's name is that of the bias which is added next, or noted beside the node.
    """
    graph, taken = Graph(proto), list_names(proto)
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


def _module_of_bias(graph: Graph, node: NodeProto) -> str:
    after = graph.only_consumer(node.output[0])
    if after is None or after.op_type != "Add":
        return ""
    bias = next((name for name in after.input if name in graph.constants), "")
    return bias.removesuffix(".bias") if bias.endswith(".bias") else ""


def _noted_module(node: NodeProto) -> str:
    notes = {entry.key.rpartition(".")[2]: entry.value for entry in node.metadata_props}
    path, kinds = (re.findall(r"'([^']*)'", notes.get(k, "")) for k in ("name_scopes", "class_hierarchy"))
    linear = len(path) > 1 and len(kinds) > 1 and kinds[-2].endswith(".Linear")
    return path[-2] if linear else ""
