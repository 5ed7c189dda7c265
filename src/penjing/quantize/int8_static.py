"""Static 8-bit integers: weights and activations on grids fixed by calibration."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from penjing.arrays.quantization import grid_of_range
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Method, Outcome, Stage, handles

if TYPE_CHECKING:
    from penjing.backends.onnx.graph import Graph, WeightNode
    from penjing.backends.onnx.model import OnnxModel
    from penjing.backends.onnx.placement import Placement


class Int8Static(Method):
    """Run convolutions and linear layers, and what lies between them, on 8-bit integers.

    Weights: signed, symmetric, one step for each output channel. Activations: unsigned, asymmetric,
    ranges from calibration on training data. The result is an ONNX model with QuantizeLinear and
    DequantizeLinear, which ONNX Runtime turns into integer kernels. Jacob et al. 2018, "Quantization
    and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"; ranges as in
    Nagel et al. 2021, "A White Paper on Neural Network Quantization".

    On x86 processors without VNNI instructions ONNX Runtime adds pairs of products in 16 bits, which may
    saturate; quality is therefore to be measured on the machine that the result is for.

    Attributes:
        observer: how a range is chosen: smallest and largest value, 99.99% of the values, or least
            squared error.
        calibration: number of training examples that ranges are taken from, at least 1.
        skip: patterns (shell wildcards) of layers that stay float.
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    calibration: int = Field(default=256, ge=1, le=1_000_000)
    skip: tuple[str, ...] = ()


@handles(Int8Static, "onnx")
def int8_static(model: OnnxModel, method: Int8Static, context: Context) -> Outcome:
    """Return the model with integer layers, and a change for each layer and each float operator.

    Raises:
        Refused: already quantized, no data, NaN or constant activations, or outputs that lost all meaning.
    """
    from penjing.backends.onnx.calibrate import ranges
    from penjing.backends.onnx.checks import compare_outputs, first_of_each, refuse_quantized
    from penjing.backends.onnx.graph import Graph, weight_nodes
    from penjing.backends.onnx.model import OnnxModel
    from penjing.backends.onnx.normalize import normalize
    from penjing.backends.onnx.placement import place
    from penjing.backends.onnx.qdq import insert_qdq

    refuse_quantized(model)
    split = context.task.train
    if len(split) == 0:
        raise Refused("calibration has examples", value=0, place="task.train", fix="give training data")
    float_model = normalize(model, split.example())
    graph = Graph(float_model.proto)
    layers = [entry for entry in weight_nodes(graph) if entry.kind != "batchnorm"]
    chosen, changes = _choose(layers, method, context.covers)
    placement = place(graph, chosen)
    changes += [_skipped(layer, reason) for layer, reason in placement.refused.items()]
    if not placement.compute:
        return Outcome(model, first_of_each(changes))
    bounds = ranges(
        float_model.proto, placement.grids, split, method.observer, method.calibration, context.seed
    )
    grids = {name: grid_of_range(low, high) for name, (low, high) in bounds.items()}
    proto, facts = insert_qdq(float_model.proto, placement, grids)
    for layer, fact in facts.items():
        changes.append(Change(method="Int8Static", layer=layer, status="done", detail={"bits": 8} | fact))
    changes += _float_operators(graph, placement, layers)
    result = OnnxModel(proto, float_model.proto)
    changes.append(compare_outputs("Int8Static", float_model, result, context))
    return Outcome(result, first_of_each(changes))


def _choose(
    layers: list[WeightNode], method: Int8Static, covers: Callable[[str], bool]
) -> tuple[list[WeightNode], list[Change]]:
    chosen, changes = [], []
    for entry in layers:
        pattern = next((p for p in method.skip if fnmatchcase(entry.name, p)), None)
        if pattern is not None:
            changes.append(_skipped(entry.name, f"left float by skip={pattern!r}"))
        elif not covers(entry.name):
            changes.append(_skipped(entry.name, "not covered by the pattern"))
        else:
            chosen.append(entry)
    return chosen, changes


def _skipped(layer: str, reason: str) -> Change:
    return Change(method="Int8Static", layer=layer, status="skipped", reason=reason)


def _float_operators(graph: Graph, placement: Placement, layers: list[WeightNode]) -> list[Change]:
    from penjing.backends.onnx.graph import shapes_and_types
    from penjing.backends.onnx.placement import MOVES

    float32 = 1
    known = shapes_and_types(graph.proto)
    on_integers = placement.integer_nodes() | {entry.node.output[0] for entry in layers}
    changes = []
    for node in graph.nodes:
        out = node.output[0]
        if out in on_integers or known.get(out, (float32, None))[0] != float32:
            continue
        if node.op_type in (*MOVES, "Gather", "Expand", "Identity") or not graph.flows(node):
            continue
        changes.append(_skipped(node.name, f"{node.op_type} stays float: no integer kernel fits here"))
    return changes
