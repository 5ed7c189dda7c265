"""Read an ONNX file and the data files beside it; nothing in them is executed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import load_external_data_for_model

from penjing.backends.onnx.graph.index import walk_nodes
from penjing.core.errors import Refused

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

LARGEST_FILE = 2**31 - 1
"""Protobuf cannot hold more in one message."""


def read_proto(path: Path) -> ModelProto:
    """Parse a file and bring its external data into memory.

    Raises:
        Refused: missing, empty, too large, truncated or foreign file, or external data that is missing or
            lies elsewhere than in a regular file in the model's folder.
    """
    if not path.is_file():
        raise Refused("must be a file", value="none", place=str(path), fix="check the path")
    size = path.stat().st_size
    if size == 0:
        raise _broken("must not be empty", path, "0 bytes")
    if size > LARGEST_FILE:
        raise Refused(
            "must be at most 2 GB",
            value=f"{size} bytes",
            place=str(path),
            fix="save the weights as external data beside the model",
        )
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        raise _broken("must be a whole ONNX file", path, f"{size} bytes that do not parse") from None
    if not proto.HasField("graph") or not (proto.graph.node and proto.graph.output):
        raise _broken("must hold a graph with nodes and outputs", path, "no graph")
    external = [tensor for tensor in _tensors(proto) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        _check_external(tensor, path)
    if external:
        load_external_data_for_model(proto, str(path.parent))
    return proto


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    graphs = [proto.graph]
    for part in (proto.graph, *proto.functions):
        for node in walk_nodes(part):
            for attribute in node.attribute:
                yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
                graphs.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
                sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
                for entry in (*sparse, *attribute.sparse_tensors):
                    yield from (entry.values, entry.indices)
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)


def _check_external(tensor: TensorProto, path: Path) -> None:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    place = f"{path}: tensor {tensor.name!r}"
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    if not location or outside or "\0" in location:
        raise Refused(
            "external data must lie in the model's folder",
            value=repr(location),
            place=place,
            fix="take the model from somebody you trust",
        )
    current = path.parent
    for part in posix.parts:
        current = current / part
        if current.is_symlink():
            raise Refused(
                "external data must not be a link",
                value=current.name,
                place=place,
                fix="put the data file itself beside the model",
            )
    if not current.exists():
        raise Refused(
            "external data must be in the model's folder",
            value=f"no {location!r}",
            place=place,
            fix="copy the data file beside the model",
        )
    found = os.lstat(current)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise Refused(
            "external data must be a regular file without hard links",
            value=current.name,
            place=place,
            fix="put a copy of the data file beside the model",
        )
    start, length = (_whole(facts.get(key, "0"), place) for key in ("offset", "length"))
    if start + length > found.st_size:
        raise Refused(
            "external data must be whole",
            value=f"{found.st_size} of {start + length} bytes",
            place=place,
            fix="copy the data file again",
        )


def _whole(text: str, place: str) -> int:
    if not text.isdecimal():
        raise Refused(
            "offset and length of external data must be whole numbers",
            value=repr(text),
            place=place,
            fix="export the model again",
        )
    return int(text)


def _broken(rule: str, path: Path, value: str) -> Refused:
    return Refused(rule, value=value, place=str(path), fix="copy or export the file again")
