"""Weights of linear layers in 4 or 8 bits, in blocks, by the runtime's own operator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import field_validator

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import decode, encode
from penjing.arrays.formats.layout import to_rows
from penjing.arrays.formats.packing import pack
from penjing.arrays.formats.stated import LayerFormats, container, in_groups, is_block, packing_lacks
from penjing.arrays.quantization import relative_error
from penjing.calibration.rounding import read_format
from penjing.core.context import Context
from penjing.core.method import Method, Outcome, Stage
from penjing.core.number_format import NumberFormat, number_format
from penjing.core.registry import handles
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.backends.onnx.graph.edit import NodeWriter
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.model import OnnxModel

_LEVEL = {"float32": 1, "int8": 4}
"""The accuracy level of MatMulNBits: 1 multiplies in float32, 4 rounds inputs to 8 bits on the way."""


class WeightOnly(Method):
    """Store the weights of linear layers in 4 or 8 bits, a scale for every block of inputs.

    The result has ONNX Runtime's operator MatMulNBits (its documentation, `ContribOperators.md`), which reads
    the packed weights at every call: an eighth or a quarter of the bytes, and faster where reading weights is
    what takes the time, as with large layers and one example at a time. Scales are those that err least in L2
    for each block. No data are needed but to check the outputs. Convolutions and embeddings stay float.

    A model that steps before it have put on number formats keeps its codes and scales; fewer than 8 bits are
    stored in 4 or 8, and a scale for a whole channel is repeated for every block of it.

    Attributes:
        weights: `int4`, `uint4`, `int8` or `uint8` in groups of a power of two, at least 16.
        compute: `float32`; or `int8`, which rounds what a layer takes to 8 bits for each block at every call.

    >>> WeightOnly("int8 group 32").compute
    'int8'
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    weights: NumberFormat = number_format("int4 group 32")
    compute: Literal["float32", "int8"] = "int8"

    def __init__(self, weights: NumberFormat | str = "int4 group 32", **fields: Any) -> None:
        super().__init__(**{"weights": weights, **fields})

    @field_validator("weights", mode="before")
    @classmethod
    def _stored(cls, value: Any) -> NumberFormat:
        found = read_format(value, f"{cls.__name__}.weights")
        blocks = is_block(found.group)
        if found.kind != "integer" or found.bits not in (4, 8) or found.narrow or not blocks:
            raise ValueError(
                "must be int4, uint4, int8 or uint8 in groups of 16, 32, 64, ...; write int4 group 32"
            )
        if found.signed != found.symmetric:
            raise ValueError("must be symmetric if signed, and have a zero point if not; write int4 or uint4")
        return found


@handles(WeightOnly, "onnx")
def weight_only(model: OnnxModel, method: WeightOnly, context: Context) -> Outcome:
    """Return the model with packed weights, and a change for each layer.

    Raises:
        Refused: already quantized, or outputs that lost all meaning.
    """
    from penjing.backends.onnx.integers.rewrite import rewrite_layers

    return rewrite_layers(model, "WeightOnly", context, partial(_Rewriter, method, {}), _reason)


@handles(WeightOnly, "torch")
def weight_only_from_torch(model: Model, method: WeightOnly, context: Context) -> Outcome:
    """Export the model and return it with packed weights, on the formats that it brings where it has any.

    Raises:
        Refused: as on ONNX, or the export fails.
    """
    from penjing.backends.onnx.integers.rewrite import rewrite_layers
    from penjing.calibration.delivery import compare_with_simulation, export_with_formats

    exported = export_with_formats(model, context)
    rewriter = partial(_Rewriter, method, exported.formats)
    reason = partial(_reason_stated, exported.formats) if exported.formats else _reason
    outcome = rewrite_layers(exported.model, "WeightOnly", exported.context, rewriter, reason)
    return Outcome(outcome.model, compare_with_simulation(exported, outcome.model, outcome.changes, context))


def _reason(graph: Graph, entry: WeightNode) -> str:
    from penjing.backends.onnx.integers.placement import find_obstacle

    if entry.kind != "linear":
        return "the operator multiplies matrices only"
    return find_obstacle(graph, entry) or ""


def _reason_stated(formats: Mapping[str, LayerFormats], graph: Graph, entry: WeightNode) -> str:
    stated = formats.get(entry.name)
    if reason := _reason(graph, entry):
        return reason
    return "the step before left it float" if stated is None else packing_lacks(stated)


class _Rewriter:
    """Writes products with packed weights; a weight that is used twice is stored once."""

    def __init__(self, method: WeightOnly, formats: Mapping[str, LayerFormats], writer: NodeWriter) -> None:
        self.method, self.formats, self.writer = method, formats, writer
        self._weights: dict[str, tuple[list[str], dict[str, float | int | str]]] = {}

    def rewrite(self, entry: WeightNode) -> dict[str, float | int | str]:
        """Add the packed form of one layer and return facts on its weight."""
        node, out = entry.node, entry.node.output[0]
        names, facts = self._weight(entry)
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
        product = self.writer.claim_name(f"{out}_product") if bias else out
        self.writer.add_node(
            "MatMulNBits",
            [node.input[0], *names],
            [product],
            domain="com.microsoft",
            K=int(facts["inputs"]),
            N=int(facts["outputs"]),
            bits=int(facts["stored_bits"]),
            block_size=int(facts["block"]),
            accuracy_level=_LEVEL[self.method.compute],
        )
        if bias:
            self.writer.add_node("Add", [product, bias], [out])
        return facts

    def _weight(self, entry: WeightNode) -> tuple[list[str], dict[str, float | int | str]]:
        name = entry.node.input[1]
        if name in self._weights:
            return self._weights[name]
        array = self.writer.graph.array(name)
        assert array is not None
        weight = entry.canonical("weight", array).astype(np.float32)
        stated = self.formats.get(entry.name)
        if stated is None:
            format = self.method.weights
            encoded = encode(weight, format, *clipped_parameters(weight, format))
        else:
            encoded = in_groups(stated.weights)
        format = encoded.format
        bits = container(format)
        # The operator's codes are unsigned; those of signed formats are shifted by half their range.
        shift = 2 ** (bits - 1) if format.signed else 0
        rows = to_rows(encoded.codes.astype(np.int32) + shift, format, shift)
        packed = pack(rows.reshape(len(weight), -1, format.group), bits)
        stored = {"packed": packed, "scales": encoded.scales.reshape(-1)}
        if encoded.zero_points is not None:
            stored["zero_points"] = pack(encoded.zero_points, bits).reshape(-1)
        names = [self.writer.add_constant(f"{name}_{part}", array) for part, array in stored.items()]
        facts: dict[str, float | int | str] = {
            "format": str(format),
            "bits": format.bits,
            "stored_bits": bits,
            "block": format.group,
            "inputs": weight.shape[1],
            "outputs": len(weight),
            "weight_error": relative_error(decode(encoded), weight),
        }
        self._weights[name] = names, facts
        return self._weights[name]
