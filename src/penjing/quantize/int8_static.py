"""Static 8-bit integers: weights and activations on grids fixed by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from penjing.arrays.formats.coding import decode
from penjing.arrays.formats.stated import LayerFormats, input_grid, kernel_lacks
from penjing.arrays.observers.observer import ObserverKind
from penjing.arrays.quantization import Grid, bias_floor, grid_of_range
from penjing.calibration.inputs import no_examples
from penjing.calibration.settings import Examples
from penjing.calibration.synthetic import CalibrationData, synthetic_needs_torch, with_synthetic_calibration
from penjing.core.context import Context
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.integers.placement import Placement
    from penjing.backends.onnx.model import OnnxModel


class Int8Static(Method):
    """Run convolutions and linear layers, and what lies between them, on 8-bit integers.

    Weights: signed, symmetric, one step for each output channel or one for all. Activations: asymmetric,
    ranges from calibration on training data. The result is an ONNX model with QuantizeLinear and
    DequantizeLinear, which ONNX Runtime turns into integer kernels. Jacob et al. 2018, "Quantization
    and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"; ranges as in
    Nagel et al. 2021, "A White Paper on Neural Network Quantization".

    A model that steps before it have put on number formats keeps them: weights of at most 8 bits with a scale
    for each channel and their rounding, inputs of 8 bits and their grid; what lies between is calibrated. A
    layer whose formats no kernel holds has its rounded weights in float, and says why.

    On x86 processors without VNNI instructions ONNX Runtime adds pairs of products in 16 bits, which may
    saturate; quality is therefore to be measured on the machine that the result is for.

    Attributes:
        observer: how a range is chosen: smallest and largest value, their moving average over batches, 99.99%
            of the values, least squared error, or least relative entropy of the values' histogram.
        examples: training examples that ranges are taken from, at least 1.
        data: what ranges are taken from: training inputs, or, with `synthetic`, at most 64 inputs made from
            what the BatchNorm layers of a PyTorch model remember of their data (Cai et al. 2020, "ZeroQ").
        inputs: how activations are stored. The values are the same; which of the two the kernels are made for
            depends on the processor: on x86 `int8` is slower than float.
        weights: a step for each output channel, or one for the whole weight, which loses more.

    >>> Int8Static(observer="percentile", examples=512).weights
    'int8 channel'
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    observer: ObserverKind = "mse"
    examples: Examples = 256
    data: CalibrationData = "train"
    inputs: Literal["uint8", "int8"] = "uint8"
    weights: Literal["int8 channel", "int8 tensor"] = "int8 channel"


@handles(Int8Static, "onnx")
def int8_static(model: OnnxModel, method: Int8Static, context: Context) -> Outcome:
    """Return the model with integer layers, and a change for each layer and each float operator.

    Raises:
        Refused: already quantized, no data, NaN or constant activations, or outputs that lost all meaning;
            inputs are to be made, for which the PyTorch model is needed.
    """
    if method.data == "synthetic":
        raise synthetic_needs_torch(method)
    return _on_integers(model, method, context, {})


@handles(Int8Static, "torch")
def int8_static_from_torch(model: Model, method: Int8Static, context: Context) -> Outcome:
    """Export the model and return it with integer layers, on the formats that it brings where it has any.

    Raises:
        Refused: as on ONNX, or the export fails; inputs are to be made for a model without BatchNorm.
    """
    from penjing.calibration.delivery import compare_with_simulation, export_with_formats

    if method.data == "synthetic":
        context = with_synthetic_calibration(model, context, method.examples)
    exported = export_with_formats(model, context)
    outcome = _on_integers(exported.model, method, exported.context, exported.formats)
    return Outcome(outcome.model, compare_with_simulation(exported, outcome.model, outcome.changes, context))


def _on_integers(
    model: OnnxModel, method: Int8Static, context: Context, formats: Mapping[str, LayerFormats]
) -> Outcome:
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import find_weight_nodes
    from penjing.backends.onnx.integers.calibrate import calibrate_ranges
    from penjing.backends.onnx.integers.checks import compare_outputs, keep_first_changes, refuse_quantized
    from penjing.backends.onnx.integers.placement import place_quantizers
    from penjing.backends.onnx.integers.qdq import IntegerTypes, insert_qdq
    from penjing.backends.onnx.model import OnnxModel
    from penjing.backends.onnx.normalize import normalize

    refuse_quantized(model)
    split = context.task.train
    if len(split) == 0:
        raise no_examples()
    float_model = normalize(model, split.example())
    graph = Graph(float_model.proto)
    layers = [entry for entry in find_weight_nodes(graph) if entry.kind != "batchnorm"]
    changes = Changes(method)
    for entry in layers:
        if not context.covers(entry.name):
            changes.skip(entry.name, "not covered by the pattern")
    chosen = [entry for entry in layers if context.covers(entry.name)]
    stated: dict[str, Grid] = {}
    if formats:
        chosen, reasons = _executable(graph, chosen, formats)
        chosen, stated, clashes = _stated_grids(graph, chosen, formats)
        _skip_all(changes, reasons | clashes)
    placement = place_quantizers(graph, chosen)
    _skip_all(changes, placement.refused)
    if not placement.compute:
        return Outcome(model, keep_first_changes(changes))
    open_ = [name for name in placement.grids if name not in stated]
    bounds = calibrate_ranges(float_model.proto, open_, split, method.observer, method.examples, context.seed)
    grids = stated | {name: grid_of_range(low, high) for name, (low, high) in bounds.items()}
    codes = {name: stated.weights for name, stated in formats.items()}
    types = IntegerTypes(method.inputs == "int8", method.weights == "int8 channel")
    proto, facts = insert_qdq(float_model.proto, placement, grids, codes, types)
    for layer, fact in facts.items():
        changes.done(layer, **{"bits": 8} | fact)
    _skip_all(changes, _float_operators(graph, placement, layers))
    result = OnnxModel(proto, float_model.proto)
    changes.append(compare_outputs("Int8Static", float_model, result, context))
    return Outcome(result, keep_first_changes(changes))


def _executable(
    graph: Graph, layers: list[WeightNode], formats: Mapping[str, LayerFormats]
) -> tuple[list[WeightNode], dict[str, str]]:
    """Split off, with the reason, layers on which nothing was stated or whose formats no kernel holds."""
    reasons = {}
    for entry in layers:
        stated = formats.get(entry.name)
        if stated is None:
            reasons[entry.name] = "the step before left it float"
        elif reason := kernel_lacks(stated) or _differs(graph, entry, stated):
            reasons[entry.name] = reason
    return [entry for entry in layers if entry.name not in reasons], reasons


def _stated_grids(
    graph: Graph, layers: list[WeightNode], formats: Mapping[str, LayerFormats]
) -> tuple[list[WeightNode], dict[str, Grid], dict[str, str]]:
    """Return layers that can have the grids that were stated on them, these by tensor, and why others cannot.

    A tensor has one grid; where layers state two on it, the first in the graph has its way.
    """
    from penjing.backends.onnx.integers.placement import place_quantizers

    reasons: dict[str, str] = {}
    while True:
        placement = place_quantizers(graph, layers)
        grids: dict[str, Grid] = {}
        owner: dict[str, str] = {}
        for entry in placement.compute.values():
            tensor, grid = placement.grid_source(graph, entry.node.input[0]), input_grid(formats[entry.name])
            assert grid is not None
            if grids.setdefault(tensor, grid) != grid:
                reasons[entry.name] = f"it takes what {owner[tensor]} takes, on another grid"
            elif not placement.saturates(graph, tensor, grid.low, grid.high):
                reasons[entry.name] = "the ends of its input's grid are not those of the activation before it"
            owner.setdefault(tensor, entry.name)
        kept = [entry for entry in layers if entry.name not in reasons]
        if len(kept) == len(layers):
            return layers, grids, reasons
        layers = kept


def _differs(graph: Graph, entry: WeightNode, stated: LayerFormats) -> str:
    """Say what in the graph does not go with what was stated on the layer; empty for nothing."""
    weight, grid = graph.array(entry.node.input[1]), input_grid(stated)
    assert weight is not None
    own, codes = entry.canonical("weight", weight), decode(stated.weights)
    if own.shape != codes.shape or not np.allclose(own, codes, rtol=1e-5, atol=1e-7):
        return "its weight in the graph is not the one that formats were stated on"
    bias = graph.array(entry.tensors.get("bias", ""))
    if grid is None or bias is None or bias.size != len(own):
        return ""
    floor = bias_floor(bias.reshape(-1), float(grid.scale))
    return (
        "its bias does not fit 32 bits in steps of input times weight"
        if (floor > stated.weights.scales).any()
        else ""
    )


def _skip_all(changes: Changes, reasons: Mapping[str, str]) -> None:
    for layer, reason in reasons.items():
        changes.skip(layer, reason)


def _float_operators(graph: Graph, placement: Placement, layers: list[WeightNode]) -> dict[str, str]:
    """Return by name why operators between the layers stay float."""
    from penjing.backends.onnx.graph.shapes import infer_types
    from penjing.backends.onnx.integers.placement import MOVES

    float32 = 1
    known = infer_types(graph.proto)
    on_integers = placement.integer_nodes() | {entry.node.output[0] for entry in layers}
    reasons = {}
    for node in graph.nodes:
        out = node.output[0]
        if out in on_integers or known.get(out, (float32, None))[0] != float32:
            continue
        if node.op_type in (*MOVES, "Gather", "Expand", "Identity") or not graph.flows(node):
            continue
        reasons[node.name] = f"{node.op_type} stays float: no integer kernel fits here"
    return reasons
