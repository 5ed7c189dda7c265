"""Checks on ONNX files from anywhere, done before any runtime sees them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx

from penjing.backends.onnx.graph.index import read_opset, walk_nodes
from penjing.core.errors import Refused

if TYPE_CHECKING:
    from onnx import ModelProto

LARGEST_TENSOR = 2**32
LARGEST_CONSTANT = 2**28
DEEPEST_CALL = 64
OLDEST_OPSET = 7
RUNTIME_DOMAINS = ("com.microsoft",)


def check_proto(proto: ModelProto, place: str) -> None:
    """Check a model in full: versions, operators, functions, sizes, structure, types and shapes.

    Raises:
        Refused: the first thing that is wrong.
    """
    _check_versions(proto, place)
    _check_functions(proto, place)
    _check_operators(proto, place)
    _check_constants(proto, place)
    errors = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError)
    try:
        onnx.checker.check_model(proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(proto)
    except errors as error:
        value = str(error).strip().replace("\n", " ")[:300]
        raise Refused(
            "must pass the ONNX checker",
            value=value,
            place=place,
            fix="export the model again",
        ) from error
    for info in inferred.graph.value_info:
        shape = info.type.tensor_type.shape.dim
        count = math.prod(dim.dim_value for dim in shape if dim.HasField("dim_value"))
        if count > LARGEST_TENSOR:
            raise Refused(
                f"must have at most {LARGEST_TENSOR} values",
                value=count,
                place=f"{place}: tensor {info.name!r}",
                fix="take the model from somebody you trust",
            )


def _check_versions(proto: ModelProto, place: str) -> None:
    if proto.ir_version > onnx.IR_VERSION:
        raise Refused(
            f"the IR version must be at most {onnx.IR_VERSION}",
            value=proto.ir_version,
            place=place,
            fix="upgrade the package onnx, or export for an older IR version",
        )
    newest = onnx.defs.onnx_opset_version()
    opset = read_opset(proto)
    if not OLDEST_OPSET <= opset <= newest:
        raise Refused(
            f"the opset must be from {OLDEST_OPSET} to {newest}",
            value=opset,
            place=place,
            fix=f"export with an opset from 18 to {newest}",
        )


def _check_functions(proto: ModelProto, place: str) -> None:
    """Refuse recursion and deep chains of functions: inlining them overflows the stack of a runtime."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    calls = {
        key: {(n.domain, n.op_type) for n in walk_nodes(f)} & set(functions) for key, f in functions.items()
    }
    depth: dict[tuple[str, str], int] = {}
    while len(depth) < len(calls):
        ready = [key for key in calls if key not in depth and calls[key] <= set(depth)]
        if not ready:
            raise Refused(
                "functions must not call themselves",
                value=f"{len(calls) - len(depth)} that do",
                place=place,
                fix="inline the functions when exporting",
            )
        for key in ready:
            depth[key] = 1 + max((depth[callee] for callee in calls[key]), default=0)
        if max(depth.values()) > DEEPEST_CALL:
            raise Refused(
                f"functions must be nested at most {DEEPEST_CALL} deep",
                value="deeper",
                place=place,
                fix="inline the functions when exporting",
            )


def _check_operators(proto: ModelProto, place: str) -> None:
    functions = {(f.domain, f.name) for f in proto.functions}
    opset = read_opset(proto)
    for part in (proto.graph, *proto.functions):
        for node in walk_nodes(part):
            domain = "" if node.domain == "ai.onnx" else node.domain
            if (node.domain, node.op_type) in functions or domain in RUNTIME_DOMAINS:
                continue
            version = opset if domain == "" else 1
            if not onnx.defs.has(node.op_type, max(version, 1), domain) and not (
                domain == "ai.onnx.ml" and onnx.defs.has(node.op_type, domain)
            ):
                name = f"{domain}.{node.op_type}" if domain else node.op_type
                raise Refused(
                    "every operator must be a known one",
                    value=f"{name} (opset {opset})",
                    place=f"{place}: node {node.name!r}",
                    fix="replace the custom operator by standard ones when exporting",
                )


def _check_constants(proto: ModelProto, place: str) -> None:
    """Refuse small files that unfold into huge tensors."""
    shapes = {t.name: t for t in proto.graph.initializer}
    for node in walk_nodes(proto.graph):
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            shapes[node.output[0]] = node.attribute[0].t
    for node in walk_nodes(proto.graph):
        shape = shapes.get(node.input[0]) if node.op_type == "ConstantOfShape" and node.input else None
        if shape is None or math.prod(shape.dims) > 64:
            continue
        count = math.prod(int(size) for size in onnx.numpy_helper.to_array(shape).ravel())
        if count > LARGEST_CONSTANT:
            raise Refused(
                f"a constant must have at most {LARGEST_CONSTANT} values",
                value=count,
                place=f"{place}: node {node.name!r}",
                fix="take the model from somebody you trust",
            )
