"""Checks on ONNX files from anywhere, done before any runtime sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from penjing.backends.onnx.graph.index import read_opset, walk_nodes
from penjing.backends.onnx.safety.bounds import check_bounds
from penjing.backends.onnx.safety.functions import check_functions
from penjing.core.errors import Refused
from penjing.core.memory_limit import require_bounds

if TYPE_CHECKING:
    from onnx import ModelProto

OLDEST_OPSET = 7
RUNTIME_DOMAINS = ("com.microsoft",)


def check_proto(proto: ModelProto, place: str, trusted: bool = False) -> None:
    """Check a model in full: versions, functions, operators, structure, types, shapes, memory and work.

    Args:
        proto: it is not changed.
        place: the file, for messages.
        trusted: memory and work of a call are not judged.

    Raises:
        Refused: the first thing that is wrong.
    """
    _check_versions(proto, place)
    check_functions(proto, place)
    _check_operators(proto, place)
    if proto.training_info:
        raise Refused(
            "must hold no graphs for training",
            value=f"{len(proto.training_info)} of them",
            place=place,
            fix="export the model for inference",
        )
    errors = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError)
    try:
        onnx.checker.check_model(proto, full_check=True)
        unbounded = "" if trusted else check_bounds(proto, place)
    except errors as error:
        value = str(error).strip().replace("\n", " ")[:300]
        raise Refused(
            "must pass the ONNX checker",
            value=value,
            place=place,
            fix="export the model again",
        ) from error
    require_bounds(unbounded, place)


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
