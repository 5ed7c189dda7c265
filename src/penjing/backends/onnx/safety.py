"""Checks on ONNX files from anywhere, done before any runtime sees them."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import load_external_data_for_model

from penjing.core.errors import Refused

LARGEST_FILE = 2**31 - 1
"""Protobuf cannot hold more in one message."""
LARGEST_TENSOR = 2**32
LARGEST_CONSTANT = 2**28
DEEPEST_CALL = 64
OLDEST_OPSET = 7
RUNTIME_DOMAINS = ("com.microsoft",)


def read_proto(path: Path) -> Any:
    """Parse a file and bring its external data into memory.

    Raises:
        Refused: missing, empty, too large, truncated or foreign file, or external data that is missing or
            lies elsewhere than in a regular file in the model's folder.
    """
    if not path.is_file():
        raise Refused("the model file exists", value=path, place="load_onnx", fix="check the path")
    size = path.stat().st_size
    if size == 0:
        raise _broken("the model file is not empty", path, "0 bytes")
    if size > LARGEST_FILE:
        raise Refused(
            "the model file is at most 2 GB",
            value=f"{size} bytes",
            place=str(path),
            fix="save the weights as external data beside the model",
        )
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        raise _broken(
            "the model file is a whole ONNX file", path, f"{size} bytes that do not parse"
        ) from None
    if not proto.HasField("graph") or not (proto.graph.node and proto.graph.output):
        raise _broken("the model file holds a graph with nodes and outputs", path, "no graph")
    external = [tensor for tensor in _tensors(proto) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        _check_external(tensor, path)
    if external:
        load_external_data_for_model(proto, str(path.parent))
    return proto


def check_proto(proto: Any, place: str) -> None:
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
            "the model passes the ONNX checker", value=value, place=place, fix="export the model again"
        ) from error
    for info in inferred.graph.value_info:
        shape = info.type.tensor_type.shape.dim
        count = math.prod(dim.dim_value for dim in shape if dim.HasField("dim_value"))
        if count > LARGEST_TENSOR:
            raise Refused(
                f"a tensor has at most {LARGEST_TENSOR} values", value=count, place=f"{place}: {info.name}"
            )


def nodes_of(graph: Any) -> Iterator[Any]:
    """Yield every node of a graph (or function) and of the graphs inside its nodes."""
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                stack.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)


def _tensors(proto: Any) -> Iterator[Any]:
    graphs = [proto.graph]
    for part in (proto.graph, *proto.functions):
        for node in nodes_of(part):
            for attribute in node.attribute:
                yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
                graphs.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
                if attribute.HasField("sparse_tensor"):
                    yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)


def _check_external(tensor: Any, path: Path) -> None:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    place = f"{path}: tensor {tensor.name!r}"
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    if not location or outside or "\0" in location:
        raise Refused(
            "external data lies in the model's folder",
            value=repr(location),
            place=place,
            fix="take the model from somebody you trust",
        )
    current = path.parent
    for part in posix.parts:
        current = current / part
        if current.is_symlink():
            raise Refused(
                "external data is no link",
                value=current.name,
                place=place,
                fix="put the data file itself beside the model",
            )
    if not current.exists():
        raise Refused(
            "external data is there",
            value=repr(location),
            place=place,
            fix="copy the data file beside the model",
        )
    found = os.lstat(current)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise Refused(
            "external data is a regular file without hard links",
            value=current.name,
            place=place,
            fix="put a copy of the data file beside the model",
        )
    start, length = (_whole(facts.get(key, "0"), place) for key in ("offset", "length"))
    if start + length > found.st_size:
        raise Refused(
            "external data is whole",
            value=f"{found.st_size} of {start + length} bytes",
            place=place,
            fix="copy the data file again",
        )


def _whole(text: str, place: str) -> int:
    if not text.isdecimal():
        raise Refused("offset and length of external data are whole numbers", value=repr(text), place=place)
    return int(text)


def _check_versions(proto: Any, place: str) -> None:
    if proto.ir_version > onnx.IR_VERSION:
        raise Refused(
            f"the IR version is at most {onnx.IR_VERSION}",
            value=proto.ir_version,
            place=place,
            fix="upgrade onnx, or export for an older version",
        )
    newest = onnx.defs.onnx_opset_version()
    opset = opset_of(proto)
    if not OLDEST_OPSET <= opset <= newest:
        raise Refused(
            f"the opset is from {OLDEST_OPSET} to {newest}",
            value=opset,
            place=place,
            fix=f"export with an opset from 18 to {newest}",
        )


def opset_of(proto: Any) -> int:
    """Return the version of the standard operators that a model imports; 0 for none."""
    return max(
        (int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0
    )


def _check_functions(proto: Any, place: str) -> None:
    """Refuse recursion and deep chains of functions: inlining them overflows the stack of a runtime."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    calls = {
        key: {(n.domain, n.op_type) for n in nodes_of(f)} & set(functions) for key, f in functions.items()
    }
    depth: dict[tuple[str, str], int] = {}
    while len(depth) < len(calls):
        ready = [key for key in calls if key not in depth and calls[key] <= set(depth)]
        if not ready:
            raise Refused("functions do not call themselves", value=len(calls) - len(depth), place=place)
        for key in ready:
            depth[key] = 1 + max((depth[callee] for callee in calls[key]), default=0)
        if max(depth.values()) > DEEPEST_CALL:
            raise Refused(
                f"functions are nested at most {DEEPEST_CALL} deep",
                value="deeper",
                place=place,
                fix="inline the functions when exporting",
            )


def _check_operators(proto: Any, place: str) -> None:
    functions = {(f.domain, f.name) for f in proto.functions}
    opset = opset_of(proto)
    for part in (proto.graph, *proto.functions):
        for node in nodes_of(part):
            domain = "" if node.domain == "ai.onnx" else node.domain
            if (node.domain, node.op_type) in functions or domain in RUNTIME_DOMAINS:
                continue
            version = opset if domain == "" else 1
            if not onnx.defs.has(node.op_type, max(version, 1), domain) and not (
                domain == "ai.onnx.ml" and onnx.defs.has(node.op_type, domain)
            ):
                name = f"{domain}.{node.op_type}" if domain else node.op_type
                raise Refused(
                    "every operator is known",
                    value=f"{name} (opset {opset})",
                    place=f"{place}: node {node.name!r}",
                    fix="replace the custom operator by standard ones when exporting",
                )


def _check_constants(proto: Any, place: str) -> None:
    """Refuse small files that unfold into huge tensors."""
    shapes = {t.name: t for t in proto.graph.initializer}
    for node in nodes_of(proto.graph):
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            shapes[node.output[0]] = node.attribute[0].t
    for node in nodes_of(proto.graph):
        shape = shapes.get(node.input[0]) if node.op_type == "ConstantOfShape" and node.input else None
        if shape is None or math.prod(shape.dims) > 64:
            continue
        count = math.prod(int(size) for size in onnx.numpy_helper.to_array(shape).ravel())
        if count > LARGEST_CONSTANT:
            raise Refused(
                f"a constant has at most {LARGEST_CONSTANT} values",
                value=count,
                place=f"{place}: node {node.name!r}",
                fix="take the model from somebody you trust",
            )


def _broken(rule: str, path: Path, value: str) -> Refused:
    return Refused(rule, value=value, place=str(path), fix="copy or export the file again")
