"""The ONNX file that a model is exported to, and what it says of inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from penjing.core.backend import Arrays, backend_for
from penjing.core.errors import Refused
from penjing.core.value import Model
from penjing.targets.signature import TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


def write_onnx(model: Model, example: Arrays, path: Path) -> ModelProto:
    """Export a model, check the file and return its graph, without weights that lie in files beside it.

    Raises:
        Refused: the exported file does not pass `onnx.checker`.
    """
    backend_for(model).export(model, example, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(
            "the exported file must pass the ONNX checker",
            value=line[:300],
            place=path.name,
            fix="upgrade the package onnx, or write the layer that is named with other operators",
        ) from error
    return onnx.load(str(path), load_external_data=False)


def describe_file(proto: ModelProto) -> dict[str, Any]:
    """Return facts for a manifest: `opset`, `inputs`, `outputs` and `batch_dependent`."""
    return {
        "opset": max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0),
        "inputs": [spec.to_json() for spec in read_input_specs(proto)],
        "outputs": [_spec(value).to_json() for value in proto.graph.output],
        "batch_dependent": any(node.op_type == "DynamicQuantizeLinear" for node in proto.graph.node),
    }


def read_input_specs(proto: ModelProto) -> tuple[TensorSpec, ...]:
    """Return what a caller gives, in the order of the graph (initializers listed as inputs are none).

    Raises:
        Refused: an input is no tensor.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    return tuple(_spec(value) for value in proto.graph.input if value.name not in weights)


def _spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type == 0:
        raise Refused(
            "must be a tensor",
            value=value.type.WhichOneof("value"),
            place=f"tensor {value.name!r}",
            fix="export the model with tensors as inputs and outputs",
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return TensorSpec(value.name, dtype, dims)
