"""The ONNX file that a model is exported to, and what it says of inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from penjing.core.backend import Arrays, backend_for
from penjing.core.errors import Refused
from penjing.core.value import Model
from penjing.targets.signature import TensorSpec


def write_onnx(model: Model, example: Arrays, path: Path) -> Any:
    """Export a model, check the file and return its graph, without weights that lie in files beside it.

    Raises:
        Refused: the exported file does not pass `onnx.checker`.
    """
    backend_for(model).export(model, example, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused("the exported file is valid ONNX", value=line[:300], place=path.name) from error
    return onnx.load(str(path), load_external_data=False)


def facts_of(proto: Any) -> dict[str, Any]:
    """Return facts for a manifest: `opset`, `inputs`, `outputs` and `batch_dependent`."""
    return {
        "opset": max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0),
        "inputs": [spec.to_json() for spec in input_specs(proto)],
        "outputs": [_spec(value).to_json() for value in proto.graph.output],
        "batch_dependent": any(node.op_type == "DynamicQuantizeLinear" for node in proto.graph.node),
    }


def input_specs(proto: Any) -> tuple[TensorSpec, ...]:
    """Return what a caller gives, in the order of the graph (initializers listed as inputs are none).

    Raises:
        Refused: an input is no tensor.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    return tuple(_spec(value) for value in proto.graph.input if value.name not in weights)


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type == 0:
        raise Refused(
            "inputs and outputs are tensors", value=value.type.WhichOneof("value"), place=value.name
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return TensorSpec(value.name, dtype, dims)
