"""What a delivered float graph computes, but for the values of its weights: equal shapes run equally fast."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.core.plan import digest

if TYPE_CHECKING:
    from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

_ONNX, _OPENVINO = "model.onnx", "model.xml"

_NUMBERED = re.compile(rb'name="([A-Za-z]+)_\d+"')
"""Names that OpenVINO gives, with a number that counts up while a process lives."""

SMALL = 64
"""Integer constants of at most so many numbers say how data are shaped, and belong to the shape."""


def digest_graph(folder: Path) -> str | None:
    """Return a digest of operators, names, attributes and shapes; None for a form without a graph in a file.

    Weights do not enter, so a fine-tuned model has the digest of the original, and a pruned one another.

    Args:
        folder: of an artefact in ONNX or in OpenVINO's representation.
    """
    if (folder / _OPENVINO).is_file():
        text = _NUMBERED.sub(rb'name="\1"', (folder / _OPENVINO).read_bytes())
        return hashlib.sha256(text).hexdigest()
    if not (folder / _ONNX).is_file():
        return None
    import onnx

    return digest(_describe(onnx.load(str(folder / _ONNX), load_external_data=False)))


def _describe(proto: ModelProto) -> list[Any]:
    graph = proto.graph
    return [
        sorted((entry.domain, entry.version) for entry in proto.opset_import),
        [[value.name, value.type.SerializeToString().hex()] for value in (*graph.input, *graph.output)],
        [[tensor.name, *_tensor(tensor)] for tensor in graph.initializer],
        [_node(node) for node in graph.node],
    ]


def _node(node: NodeProto) -> list[Any]:
    return [
        node.domain,
        node.op_type,
        list(node.input),
        list(node.output),
        sorted(_attribute(entry) for entry in node.attribute),
    ]


def _attribute(entry: AttributeProto) -> list[Any]:
    if entry.HasField("t"):
        return [entry.name, str(_tensor(entry.t))]
    return [entry.name, entry.SerializeToString(deterministic=True).hex()]


def _tensor(tensor: TensorProto) -> list[Any]:
    """Return type and dimensions, and the numbers of a short list of integers."""
    from onnx import TensorProto, numpy_helper

    dims = list(tensor.dims)
    integers = tensor.data_type in (TensorProto.INT32, TensorProto.INT64)
    if not integers or math.prod(dims) > SMALL or tensor.data_location == TensorProto.EXTERNAL:
        return [tensor.data_type, dims]
    return [tensor.data_type, dims, numpy_helper.to_array(tensor).tolist()]
