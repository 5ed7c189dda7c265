"""Dynamic 8-bit integers: weights on fixed grids, activations on a grid found at every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from penjing.arrays.quantization import dequantize_weight, quantize_weight, relative_error, weight_scales
from penjing.core.context import Context
from penjing.core.method import Method, Outcome, Stage
from penjing.core.registry import handles

if TYPE_CHECKING:
    from penjing.backends.onnx.graph.edit import NodeWriter
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.model import OnnxModel


class Int8Dynamic(Method):
    """Run linear layers on 8-bit integers; the range of each input is taken when the model runs.

    Weights: signed, symmetric, one step for each output channel. Activations: unsigned, one grid for a
    whole tensor and call (so the result for one example depends on its batch). It needs no calibration.
    Convolutions stay float: their dynamic kernel is 2 to 10 times slower than the float one. Zafrir et
    al. 2019, "Q8BERT", section 2; the operators are ONNX's DynamicQuantizeLinear and MatMulInteger.

    >>> Int8Dynamic().stage.name
    'PRECISION'
    """

    stage: ClassVar[Stage] = Stage.PRECISION


@handles(Int8Dynamic, "onnx")
def int8_dynamic(model: OnnxModel, method: Int8Dynamic, context: Context) -> Outcome:
    """Return the model with integer linear layers, and a change for each layer.

    Raises:
        Refused: already quantized, or outputs that lost all meaning.
    """
    from penjing.backends.onnx.integers.rewrite import rewrite_layers

    return rewrite_layers(model, "Int8Dynamic", context, _Rewriter, _unsupported)


def _unsupported(graph: Graph, entry: WeightNode) -> str:
    from penjing.backends.onnx.integers.placement import find_obstacle

    if entry.node.op_type in ("Conv", "ConvTranspose"):
        return "the dynamic integer convolution is 2 to 10 times slower than the float one"
    return find_obstacle(graph, entry) or ""


class _Rewriter:
    """Writes integer products; inputs used by several layers are quantized once."""

    def __init__(self, writer: NodeWriter) -> None:
        self.writer = writer
        self._inputs: dict[str, list[str]] = {}
        self._weights: dict[str, tuple[list[str], float]] = {}

    def rewrite(self, entry: WeightNode) -> dict[str, float | int | str]:
        """Add the integer form of one layer and return the bits and relative L2 error of its weight.

        The order of the operators is the one that ONNX Runtime fuses into MatMulIntegerToFloat.
        """
        node, out = entry.node, entry.node.output[0]
        integer, step, zero = self._input(node.input[0])
        (weight, weight_step, weight_zero), error = self._weight(entry)
        total, real, steps = (self.writer.claim_name(f"{out}_{part}") for part in ("int32", "float", "steps"))
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
        product = self.writer.claim_name(f"{out}_product") if bias else out
        self.writer.add_node("MatMulInteger", [integer, weight, zero, weight_zero], [total])
        self.writer.add_node("Cast", [total], [real], to=1)
        self.writer.add_node("Mul", [step, weight_step], [steps])
        self.writer.add_node("Mul", [real, steps], [product])
        if bias:
            self.writer.add_node("Add", [product, bias], [out])
        return {"bits": 8, "weight_error": error}

    def _input(self, name: str) -> list[str]:
        if name not in self._inputs:
            made = [self.writer.claim_name(f"{name}_{part}") for part in ("quantized", "scale", "zero_point")]
            self.writer.add_node("DynamicQuantizeLinear", [name], made)
            self._inputs[name] = made
        return self._inputs[name]

    def _weight(self, entry: WeightNode) -> tuple[list[str], float]:
        name = entry.node.input[1]
        if name not in self._weights:
            array = self.writer.graph.array(name)
            assert array is not None
            canonical = entry.canonical("weight", array)
            scales = weight_scales(canonical)
            integers = quantize_weight(canonical, scales)
            names = [
                self.writer.add_constant(f"{name}_quantized", np.ascontiguousarray(integers.T)),
                self.writer.add_constant(f"{name}_scale", scales),
                self.writer.add_constant(f"{name}_zero_point", np.zeros(scales.shape, np.int8)),
            ]
            self._weights[name] = names, relative_error(dequantize_weight(integers, scales), canonical)
        return self._weights[name]
