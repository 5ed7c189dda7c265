"""A module as a checked ONNX file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from penjing.backends.torch.graph.capture import capture, require_dynamic, silenced
from penjing.backends.torch.quantizers import refuse_simulated
from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.files import write_bytes

if TYPE_CHECKING:
    import onnx

OPSET = 18


def export(model: nn.Module, example: Arrays, path: Path) -> None:
    """Write a module, in evaluation mode, as a checked ONNX file whose batch is dynamic.

    Inputs are named as the arguments of forward, the output `output`, several `output0`, `output1` and so on
    in the order in which the module returns them, initializers as the module's parameters, the first axis of
    inputs and outputs `batch`. Weights are inside the file.

    Raises:
        Refused: the model simulates number formats, torch cannot capture or export it, its code fixes the
            batch size, or the file does not pass the checker.
    """
    import onnx

    refuse_simulated(model)
    captured = capture(model, example)
    require_dynamic(captured)
    several = len(captured.outputs) > 1
    _fix_strides(captured.program.graph_module)
    with silenced():
        try:
            program = torch.onnx.export(
                captured.program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(captured.names),
                output_names=[f"output{i}" for i in range(len(captured.outputs))] if several else ["output"],
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            # The exporter wraps whatever its passes raise; none of it is ours.
            raise Refused(
                "the model must be one that torch.onnx can export",
                value=_cause(error),
                place="export",
                code=Exit.BAD_INPUT,
                fix="replace what is named by operators of ONNX, or leave methods that need a file out",
            ) from error
    proto = program.model_proto
    _tidy(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Refused(
            "the exported file must pass onnx.checker",
            value=str(error).splitlines()[0],
            place="export",
            fix="try another version of torch or onnx, and report the model",
        ) from error
    write_bytes(path, proto.SerializeToString())


def _fix_strides(module: fx.GraphModule) -> None:
    """Say that attention's result lies in memory in order.

    Its kernel on this machine may lay it out in another way than the operators that the exporter makes of it,
    and a reshape that one of them needs no copy for is then written down as one that the other refuses.
    """
    for inner in module.modules():
        if not isinstance(inner, torch.fx.GraphModule):
            continue
        for node in inner.graph.find_nodes(op="call_function", target=_ATTENTION):
            users = [user for user in node.users if user.op == "call_function"]
            with inner.graph.inserting_after(node):
                ordered = inner.graph.call_function(torch.ops.aten.contiguous.default, (node,))
            ordered.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, ordered)
        inner.recompile()


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _cause(error: Exception) -> str:
    """Return the line that says why: the exporter's reports begin with advice and end with a summary."""
    text = str(error).strip()
    summary = re.search(r"^<class '(?:[\w]+\.)*(\w+)'>: (.+)$", text, re.MULTILINE)
    name, line = summary.groups() if summary else (type(error).__name__, (text.splitlines() or [""])[0])
    return f"{name}: {line[:300]}"


_MODULE_KEYS = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")


def _tidy(proto: onnx.ModelProto) -> None:
    """Drop inferred shapes, which go stale when tools edit the file, and name the batch axis."""
    del proto.graph.value_info[:]
    symbols = {
        v.type.tensor_type.shape.dim[0].dim_param for v in proto.graph.input if v.type.tensor_type.shape.dim
    }
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols - {""}:
                dim.dim_param = "batch"
    for node in proto.graph.node:
        # Traces of the exporting machine go: file paths and line numbers of the user's code. The module's
        # name stays where no weight's name tells it: a product whose weight the exporter transposed.
        kept = [p for p in node.metadata_props if node.op_type == "MatMul" and p.key in _MODULE_KEYS]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.ClearField("doc_string")
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
