"""Element types and shapes of a graph's tensors, as ONNX's own inference finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from onnx import ModelProto


def infer_types(proto: ModelProto) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
    """Infer for every tensor its ONNX element type and its shape (None for what is not known)."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    found: dict[str, tuple[int, tuple[int | None, ...] | None]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        found[value.name] = (tensor.elem_type, tuple(dims) if tensor.HasField("shape") else None)
    return found
