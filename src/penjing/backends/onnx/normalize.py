"""Bring float graphs of any exporter into one form, with the same outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from numpy.typing import NDArray

from penjing.backends.onnx.graph.edit import NodeWriter, claim_name, copy_proto, replace_constants, set_nodes
from penjing.backends.onnx.graph.index import Graph, get_attribute, read_opset
from penjing.backends.onnx.graph.layers import restore_weight_names
from penjing.backends.onnx.graph.shapes import infer_types
from penjing.backends.onnx.model import OnnxModel
from penjing.core.backend import Arrays
from penjing.core.errors import Refused

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OPSET = 18
"""Older models are converted to it: integers per channel need 13, ReduceMean's axes as input 18."""
TOLERANCE = 1e-4


def normalize(model: OnnxModel, example: Arrays | None) -> OnnxModel:
    """Return the model with batch normalization folded and aliases gone; names of weights stay.

    Functions are inlined, initializers are no longer inputs, constants are initializers, nodes have unique
    names and no notes, Identity and Dropout are gone, BatchNormalization is part of the convolution or
    linear layer before it (Jacob et al. 2018, section 3.2), a linear MatMul with Add is a Gemm, a mean
    over space is a global pooling.

    Args:
        model: a float model; it is not changed.
        example: inputs on which the outputs before and after are compared; None: nothing is compared.

    Raises:
        Refused: the model cannot be converted to a current opset, or the outputs differ.
    """
    proto = copy_proto(model.proto)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    proto = _convert_opset(proto)
    _drop_constant_inputs(proto)
    for step in (
        restore_weight_names,
        _move_constants,
        _drop_aliases,
        _fold_batchnorm,
        _fold_gemm_factors,
        _join_matmul_add,
        _write_mean_as_pooling,
    ):
        step(proto)
    _name_nodes(proto)
    result = OnnxModel(proto, model.reference)
    if example is not None:
        _same_outputs(model, result, example)
    return result


def _convert_opset(proto: ModelProto) -> ModelProto:
    if read_opset(proto) >= OPSET:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, OPSET)
    except (RuntimeError, onnx.version_converter.ConvertError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise Refused(
            f"must convert to opset {OPSET}",
            value=f"{reason} (opset {read_opset(proto)})",
            place="model",
            fix=f"export the model with opset {OPSET} or newer",
        ) from error


def _drop_constant_inputs(proto: ModelProto) -> None:
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)


def _name_nodes(proto: ModelProto) -> None:
    taken: set[str] = set()
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    for node in proto.graph.node:
        # Exporters note stack traces with paths of the machine; they must not travel with the model.
        del node.metadata_props[:]
        node.doc_string = ""
        node.name = claim_name(node.name or f"{node.op_type}_{node.output[0]}", taken)


def _move_constants(proto: ModelProto) -> None:
    kept = []
    for node in proto.graph.node:
        value = node.attribute[0] if node.op_type == "Constant" else None
        if value is not None and value.name == "value":
            tensor = proto.graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    set_nodes(proto, kept)


def _drop_aliases(proto: ModelProto) -> None:
    """Remove Identity and Dropout nodes; the name of a graph's output moves to what produces it."""
    graph = Graph(proto)
    alias: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            node.input[index] = alias.get(name, name)
        plain = node.op_type in ("Identity", "Dropout") and not any(
            graph.consumers.get(n) for n in node.output[1:]
        )
        captured = any(a.HasField("g") for other in graph.nodes for a in other.attribute)
        if not plain or captured or node.output[0] in graph.outputs:
            kept.append(node)
        else:
            alias[node.output[0]] = node.input[0]
    set_nodes(proto, kept)


def _fold_batchnorm(proto: ModelProto) -> None:
    graph = Graph(proto)
    writer = NodeWriter(graph)
    for node in graph.nodes:
        before = _layer_before(graph, node) if node.op_type == "BatchNormalization" else None
        if before is None:
            writer.nodes.append(node)
            continue
        gamma, beta, mean, variance = (np.asarray(graph.array(s), np.float64) for s in node.input[1:5])
        factor = gamma / np.sqrt(variance + get_attribute(node, "epsilon", 1e-5))
        _scale_outputs(writer, before, factor, beta - mean * factor)
        before.output[0] = node.output[0]
    writer.write()


def _layer_before(graph: Graph, node: NodeProto) -> NodeProto | None:
    """Return the layer whose outputs a BatchNormalization alone takes, if it can take over its work."""
    before = graph.producer.get(node.input[0])
    constant = all(graph.array(name) is not None for name in node.input[1:5])
    if before is None or graph.only_consumer(node.input[0]) is None or not constant:
        return None
    plain = not any(graph.consumers.get(name) for name in node.output[1:])
    return before if plain and _foldable(graph, before) else None


def _foldable(graph: Graph, node: NodeProto) -> bool:
    """Tell whether a node's output channels can be scaled in its weight, used by no other node."""
    if node.op_type == "Gemm":
        if get_attribute(node, "alpha", 1.0) != 1 or get_attribute(node, "beta", 1.0) != 1:
            return False
    elif node.op_type not in ("Conv", "ConvTranspose"):
        return False
    constants = [name for name in node.input[1:] if name]
    if node.op_type == "ConvTranspose" and get_attribute(node, "group", 1) != 1:
        return False
    return (
        all(name in graph.constants for name in constants) and graph.only_consumer(node.input[1]) is not None
    )


def _scale_outputs(
    writer: NodeWriter, node: NodeProto, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    graph = writer.graph
    weight = graph.array(node.input[1])
    assert weight is not None
    axis = 0 if node.op_type == "Conv" else 1
    if node.op_type == "Gemm" and get_attribute(node, "transB", 0):
        axis = 0
    shape = [1] * weight.ndim
    shape[axis] = -1
    writer.arrays[node.input[1]] = (weight * factor.reshape(shape)).astype(weight.dtype)
    bias = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    fresh = (shift if bias is None else bias.reshape(-1) * factor + shift).astype(weight.dtype)
    if bias is not None and graph.only_consumer(node.input[2]) is not None:
        writer.arrays[node.input[2]] = fresh
        return
    name = writer.add_constant(node.input[1].removesuffix(".weight") + ".bias", fresh)
    del node.input[2:]
    node.input.append(name)


def _fold_gemm_factors(proto: ModelProto) -> None:
    """Multiply alpha and beta of a Gemm into its constants, so that its integer form is plain."""
    graph = Graph(proto)
    arrays: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op_type != "Gemm":
            continue
        for index, key in ((1, "alpha"), (2, "beta")):
            factor = get_attribute(node, key, 1.0)
            name = node.input[index] if len(node.input) > index else ""
            array = graph.array(name) if name in graph.constants else None
            if factor == 1 or array is None or graph.only_consumer(name) is None:
                continue
            arrays[name] = (array * factor).astype(array.dtype)
            kept = [a for a in node.attribute if a.name != key]
            del node.attribute[:]
            node.attribute.extend(kept)
    replace_constants(proto, arrays)


def _join_matmul_add(proto: ModelProto) -> None:
    """Join MatMul with a matrix and Add of a vector into a Gemm, where the input is a matrix too."""
    graph = Graph(proto)
    known = infer_types(proto)
    dropped: set[int] = set()
    for node in graph.nodes:
        after = graph.only_consumer(node.output[0]) if node.op_type == "MatMul" else None
        shape = known.get(node.input[0], (0, None))[1] if after is not None else None
        weight = graph.array(node.input[1]) if shape is not None and len(shape) == 2 else None
        if after is None or after.op_type != "Add" or weight is None or weight.ndim != 2:
            continue
        other = next((name for name in after.input if name != node.output[0]), "")
        bias = graph.array(other)
        if bias is None or bias.shape != (weight.shape[1],):
            continue
        node.op_type = "Gemm"
        node.input.append(other)
        node.output[0] = after.output[0]
        dropped.add(id(after))
    set_nodes(proto, [node for node in graph.nodes if id(node) not in dropped])


def _write_mean_as_pooling(proto: ModelProto) -> None:
    """Write a mean over all axes but batch and channels as GlobalAveragePool (and Flatten)."""
    graph = Graph(proto)
    known = infer_types(proto)
    writer = NodeWriter(graph)
    for node in graph.nodes:
        shape = known.get(node.input[0], (0, None))[1] if node.op_type == "ReduceMean" else None
        axes = graph.array(node.input[1]) if shape is not None and len(node.input) > 1 else None
        if shape is None or axes is None or not _is_space(axes, len(shape)):
            writer.nodes.append(node)
        elif get_attribute(node, "keepdims", 1):
            writer.add_node("GlobalAveragePool", node.input[:1], node.output)
        else:
            pooled = writer.claim_name(f"{node.output[0]}_pooled")
            writer.add_node("GlobalAveragePool", node.input[:1], [pooled])
            writer.add_node("Flatten", [pooled], node.output, axis=1)
    writer.write()


def _is_space(axes: NDArray[Any], rank: int) -> bool:
    """Tell whether axes are all of a tensor's but batch and channels."""
    return rank > 2 and sorted(int(axis) % rank for axis in axes.ravel()) == list(range(2, rank))


def _same_outputs(before: OnnxModel, after: OnnxModel, example: Arrays) -> None:
    for old, new in zip(before.run(example), after.run(example), strict=True):
        if old.dtype.kind != "f":
            continue
        gap = float(np.abs(old - new).max(initial=0.0))
        size = float(np.abs(old).max(initial=0.0))
        if not gap <= TOLERANCE * max(size, 1e-3):
            raise Refused(
                f"folding BatchNormalization must change outputs by at most {TOLERANCE:g} of the largest",
                value=f"{gap / max(size, 1e-3):.1e}",
                place="model",
                fix="look for NaN, for variances near 0 and for very large weights in the model",
            )
