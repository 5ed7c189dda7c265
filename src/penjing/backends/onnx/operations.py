"""Parameters and multiply-adds of an ONNX graph, from inferred shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper, numpy_helper

from penjing.backends.onnx.graph.edit import copy_proto
from penjing.backends.onnx.graph.index import FLOATS, Graph, get_attribute, list_inputs
from penjing.backends.onnx.graph.layers import find_weight_nodes
from penjing.backends.onnx.graph.shapes import infer_types
from penjing.core.backend import Arrays
from penjing.core.measurement import Operations

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FREE = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift
BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Compress Concat Constant
ConstantOfShape Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal
Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity
InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
LpNormalization LpPool Max MaxPool MaxUnpool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonZero
Not OneHot Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence
RMSNormalization Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice
Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK
Transpose Trilu Unsqueeze Upsample Where Xor
"""
_NO_MULTIPLY_ADDS = frozenset(_FREE.split())
_PRODUCTS = ("Gemm", "MatMul", "MatMulInteger")
_CONVOLUTIONS = ("Conv", "ConvInteger")


def count_operations(proto: ModelProto, example: Arrays) -> Operations:
    """Count parameters and multiply-adds of one example.

    Parameters are the values of constant tensors that numbers flow through (shared ones once), whatever
    their width; scales, zero points, scalars and constants that describe shapes are not. Multiply-adds
    are those of convolutions and matrix products; elementwise operators, pooling and normalization have
    none by convention. Operators without a formula, or whose shapes are not known, are named.
    """
    fixed = _with_batch_of_one(proto, example)
    graph = Graph(fixed)
    shapes = {name: shape for name, (_, shape) in infer_types(fixed).items()}
    shapes |= {name: tuple(tensor.dims) for name, tensor in graph.constants.items()}
    layers = {entry.node.output[0]: entry.name for entry in find_weight_nodes(graph)}
    by_layer: dict[str, int] = {}
    total, uncounted = 0, set()
    for node in graph.nodes:
        count = _multiply_adds(node, shapes)
        if count is None:
            uncounted.add(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
        else:
            total += count
        if count and node.output[0] in layers:
            layer = layers[node.output[0]]
            by_layer[layer] = by_layer.get(layer, 0) + count
    tensors = _parameters(graph)
    return Operations(
        parameters=sum(math.prod(tensor.dims) for tensor in tensors),
        multiply_adds=total,
        uncounted=tuple(sorted(uncounted)),
        by_layer=by_layer,
        zeros=sum(int((numpy_helper.to_array(t) == 0).sum()) for t in tensors if len(t.dims) > 1),
    )


def _with_batch_of_one(proto: ModelProto, example: Arrays) -> Any:
    fixed = copy_proto(proto)
    del fixed.graph.value_info[:]
    shapes = dict(zip(list_inputs(proto), (np.asarray(array).shape for array in example), strict=True))
    for value in fixed.graph.input:
        if value.name in shapes:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, [1, *shapes[value.name][1:]]))
    # A named dynamic batch of the outputs would clash with the fixed one.
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    return fixed


def _multiply_adds(node: NodeProto, shapes: dict[str, Any]) -> int | None:
    if node.op_type in _NO_MULTIPLY_ADDS and node.domain in ("", "ai.onnx"):
        return 0
    if node.op_type not in (*_PRODUCTS, *_CONVOLUTIONS, "ConvTranspose"):
        return None
    given, weight, made = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if given is None or weight is None or made is None or None in (*given, *weight, *made):
        return None
    if node.op_type in _CONVOLUTIONS:
        return int(math.prod(made) * math.prod(weight[1:]))
    if node.op_type == "ConvTranspose":
        return int(math.prod(given) * math.prod(weight[1:]))
    inner = given[0] if get_attribute(node, "transA", 0) else given[-1]
    return int(math.prod(made) * inner)


def _is_dynamic(graph: Graph, name: str) -> bool:
    producer = graph.producer.get(name)
    return producer is not None and producer.op_type == "DynamicQuantizeLinear"


def _parameters(graph: Graph) -> list[Any]:
    described: set[str] = set()
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            described.update(node.input[1:])
        if node.op_type == "MatMulInteger":
            described.update(node.input[2:])
        if node.op_type == "Mul" and any(_is_dynamic(graph, name) for name in node.input):
            described.update(node.input)
    integers = {node.input[0] for node in graph.nodes if node.op_type == "DequantizeLinear"}
    integers |= {node.input[1] for node in graph.nodes if node.op_type == "MatMulInteger"}
    return [
        tensor
        for name, tensor in graph.constants.items()
        if name not in described and tensor.dims and (tensor.data_type in FLOATS or name in integers)
    ]
