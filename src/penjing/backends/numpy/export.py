"""Write a net as a checked ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.backends.numpy.evaluate import evaluate
from penjing.backends.numpy.net import Node, NumpyNet
from penjing.core.backend import Arrays
from penjing.core.extras import need
from penjing.core.files import write_bytes

if TYPE_CHECKING:
    from onnx import NodeProto, ValueInfoProto

OPSET = 18
IR_VERSION = 9
"""Understood by every ONNX Runtime that has the opset."""

_BATCHNORM = ("weight", "bias", "running_mean", "running_var")


def export(net: NumpyNet, example: Arrays, path: Path) -> None:
    """Write one file: inputs named as in the net, the first axis `batch`, weights `layer.tensor`.

    Raises:
        Refused: the package onnx is not installed, or the net does not run on the example.
    """
    need("onnx", "the export to ONNX")
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    values = evaluate(net, example)
    output = net.nodes[-1].name

    def declared(name: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *values[name].shape[1:]])

    weights = [
        numpy_helper.from_array(array, f"{layer}.{name}")
        for layer, tensors in net.tensors.items()
        for name, array in tensors.items()
    ]
    nodes = [made for node in net.nodes for made in WRITE[node.op](node, net)]
    graph = helper.make_graph(nodes, "net", [declared(n) for n in net.inputs], [declared(output)], weights)
    opsets = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="penjing")
    onnx.checker.check_model(proto, full_check=True)
    write_bytes(path, proto.SerializeToString(deterministic=True))


def _node(kind: str, output: str, names: Sequence[str], **attributes: Any) -> NodeProto:
    from onnx import helper

    return helper.make_node(kind, [*names], [output], name=output, **attributes)


def _weighted(node: Node, net: NumpyNet) -> list[str]:
    bias = [f"{node.name}.bias"] if "bias" in net.tensors[node.name] else []
    return [*node.inputs, f"{node.name}.weight", *bias]


def _square(node: Node) -> dict[str, Any]:
    stride, padding = node.whole("stride"), node.whole("padding")
    return {"strides": [stride] * 2, "pads": [padding] * 4}


def _conv2d(node: Node, net: NumpyNet) -> list[NodeProto]:
    size = list(net.tensors[node.name]["weight"].shape[2:])
    return [
        _node(
            "Conv",
            node.name,
            _weighted(node, net),
            kernel_shape=size,
            group=node.whole("groups"),
            **_square(node),
        )
    ]


def _linear(node: Node, net: NumpyNet) -> list[NodeProto]:
    return [_node("Gemm", node.name, _weighted(node, net), transB=1)]


def _batchnorm(node: Node, net: NumpyNet) -> list[NodeProto]:
    names = [*node.inputs, *(f"{node.name}.{tensor}" for tensor in _BATCHNORM)]
    return [_node("BatchNormalization", node.name, names, epsilon=float(node["eps"]))]


def _max_pool(node: Node, net: NumpyNet) -> list[NodeProto]:
    return [
        _node("MaxPool", node.name, node.inputs, kernel_shape=[node.whole("kernel")] * 2, **_square(node))
    ]


def _avg_pool(node: Node, net: NumpyNet) -> list[NodeProto]:
    size = [node.whole("kernel")] * 2
    return [
        _node("AveragePool", node.name, node.inputs, kernel_shape=size, count_include_pad=1, **_square(node))
    ]


def _global_mean(node: Node, net: NumpyNet) -> list[NodeProto]:
    pooled = f"{node.name}/pooled"
    return [
        _node("GlobalAveragePool", pooled, node.inputs),
        _node("Flatten", node.name, [pooled], axis=1),
    ]


WRITE: Mapping[str, Callable[[Node, NumpyNet], list[NodeProto]]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "relu": lambda node, net: [_node("Relu", node.name, node.inputs)],
    "add": lambda node, net: [_node("Add", node.name, node.inputs)],
    "concat": lambda node, net: [_node("Concat", node.name, node.inputs, axis=1)],
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_mean": _global_mean,
    "flatten": lambda node, net: [_node("Flatten", node.name, node.inputs, axis=1)],
}
"""How every operator is written."""
