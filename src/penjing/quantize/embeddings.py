"""Embedding tables in rows of 8 or 4 bits, read by real operators."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import Encoded, decode, encode
from penjing.arrays.formats.packing import pack
from penjing.arrays.quantization import relative_error
from penjing.calibration.rounding import read_format
from penjing.core.context import Context
from penjing.core.method import Method, Outcome, Stage
from penjing.core.number_format import NumberFormat, number_format
from penjing.core.registry import handles

if TYPE_CHECKING:
    from penjing.backends.onnx.graph.edit import NodeWriter
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.model import OnnxModel

SMALLEST_BLOCK = 16
"""Of GatherBlockQuantized."""
CHUNK = 2**22
"""Values of a table that are rounded at a time."""

Facts = dict[str, float | int | str]


class QuantizeEmbeddings(Method):
    """Store embedding tables in 8 or 4 bits, with a scale for every row or for every group in a row.

    Rows are looked up as integers and scaled then, so that a lookup costs what its rows cost, not the table.
    Signed 8-bit rows with one scale are read by Gather, Cast and Mul; all others by ONNX Runtime's
    GatherBlockQuantized (its documentation, `ContribOperators.md`). Scales are those that err least in L2.
    What a lookup gives is the reference's value to the bit. No data are needed but to check the outputs.

    Attributes:
        weights: `int8`, `uint8`, `int4` or `uint4`, with one scale for each row where it does not say
            otherwise, or for groups of a power of two, at least 16.

    >>> QuantizeEmbeddings("uint4 group 32").weights
    number_format('uint4 group 32')
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    weights: NumberFormat = number_format("int8 channel")

    def __init__(self, weights: NumberFormat | str = "int8 channel", **fields: Any) -> None:
        super().__init__(**{"weights": weights, **fields})

    @field_validator("weights", mode="before")
    @classmethod
    def _stored(cls, value: Any) -> NumberFormat:
        found = read_format(value, f"{cls.__name__}.weights")
        if found.granularity == "tensor":
            found = found.model_copy(update={"granularity": "channel"})
        if found.kind != "integer" or found.bits not in (4, 8) or found.narrow:
            raise ValueError("must be int8, uint8, int4 or uint4; write int8")
        if found.signed != found.symmetric:
            raise ValueError("must be symmetric if signed, and have a zero point if not; write int8 or uint8")
        whole = found.group >= SMALLEST_BLOCK and found.group & (found.group - 1) == 0
        if found.granularity != "channel" and not whole:
            raise ValueError(
                "must have a scale for each row or for groups of 16, 32, 64, ...; write int4 group 32"
            )
        return found


@handles(QuantizeEmbeddings, "onnx")
def quantize_embeddings(model: OnnxModel, method: QuantizeEmbeddings, context: Context) -> Outcome:
    """Return the model with packed tables, and a change for each layer with weights.

    Raises:
        Refused: layers are quantized already, or outputs that lost all meaning.
    """
    from penjing.backends.onnx.integers.rewrite import rewrite_layers

    rewriter, reason = partial(_Rewriter, method.weights), partial(_reason, method.weights)
    return rewrite_layers(model, "QuantizeEmbeddings", context, rewriter, reason)


def _reason(format: NumberFormat, graph: Graph, entry: WeightNode) -> str:
    from penjing.backends.onnx.graph.index import get_attribute

    name = entry.tensors["weight"]
    users = graph.consumers[name]
    if entry.kind != "embedding":
        return "it is no embedding table"
    if get_attribute(entry.node, "axis", 0) != 0:
        return "it is not looked up by rows"
    if name in graph.outputs or any(not _looks_up(user, name) for user in users):
        return "the table is used as a matrix too, which keeps it float"
    array = graph.array(name)
    if array is None or array.dtype != np.float32:
        return "its values are no float32 constants"
    if not np.isfinite(array).all():
        return "it holds NaN or infinite values"
    if array.shape[1] * format.bits % 8:
        return f"{array.shape[1]} values of {format.bits} bits are no whole bytes"
    if format.bits_per_value(array.shape) >= 32:
        return "with its scales it would be no smaller"
    return ""


def _looks_up(node: Any, table: str) -> bool:
    from penjing.backends.onnx.graph.index import get_attribute, list_node_inputs

    once = node.op_type == "Gather" and list_node_inputs(node).count(table) == 1
    return once and node.input[0] == table and get_attribute(node, "axis", 0) == 0


class _Rewriter:
    """Writes lookups of packed rows; a table that is looked up twice is stored once."""

    def __init__(self, format: NumberFormat, writer: NodeWriter) -> None:
        self.format, self.writer = format, writer
        self._tables: dict[str, tuple[list[str], Facts]] = {}

    def rewrite(self, entry: WeightNode) -> Facts:
        """Add the lookup of packed rows and return facts on the table."""
        from onnx import TensorProto

        _, index = entry.node.input
        out = entry.node.output[0]
        (table, *parameters), facts = self._table(entry.tensors["weight"])
        if self._by_row():
            codes, real, scale = (
                self.writer.claim_name(f"{out}_{part}") for part in ("codes", "float", "scale")
            )
            self.writer.add_node("Gather", [table, index], [codes])
            self.writer.add_node("Cast", [codes], [real], to=TensorProto.FLOAT)
            self.writer.add_node("Gather", [parameters[0], index], [scale])
            self.writer.add_node("Mul", [real, scale], [out])
        else:
            self.writer.add_node(
                "GatherBlockQuantized",
                [table, index, *parameters],
                [out],
                domain="com.microsoft",
                bits=self.format.bits,
                block_size=int(facts["block"]),
                gather_axis=0,
                quantize_axis=1,
            )
        return facts

    def _by_row(self) -> bool:
        return self.format.granularity == "channel" and self.format.bits == 8 and self.format.symmetric

    def _table(self, name: str) -> tuple[list[str], Facts]:
        if name in self._tables:
            return self._tables[name]
        array = self.writer.graph.array(name)
        assert array is not None
        rows, width = array.shape
        encoded = _encoded(array, self.format)
        stored = {"quantized": encoded.codes, "scales": encoded.scales.reshape(rows, -1)}
        if not self._by_row():
            # The operator's codes are unsigned; without zero points the middle of their range is 0.
            shift = 2 ** (self.format.bits - 1) if self.format.signed else 0
            stored["quantized"] = pack(encoded.codes.astype(np.int32) + shift, self.format.bits)
            if encoded.zero_points is not None:
                stored["zero_points"] = pack(encoded.zero_points.reshape(rows, -1), self.format.bits)
        names = [self.writer.add_constant(f"{name}_{part}", array) for part, array in stored.items()]
        facts: Facts = {
            "format": str(self.format),
            "bits": self.format.bits,
            "rows": rows,
            "width": width,
            "block": self.format.group or max(SMALLEST_BLOCK, 1 << (width - 1).bit_length()),
            "bits_per_value": 8 * sum(part.nbytes for part in stored.values()) / array.size,
            "weight_error": relative_error(decode(encoded), array),
        }
        self._tables[name] = names, facts
        return self._tables[name]


def _encoded(table: NDArray[np.float32], format: NumberFormat) -> Encoded:
    """Return the nearest codes under the best scales, taking some rows at a time."""
    step = max(1, CHUNK // table.shape[1])
    parts = []
    for start in range(0, len(table), step):
        rows = table[start : start + step]
        parts.append(encode(rows, format, *clipped_parameters(rows, format)))
    codes, scales = (np.concatenate([getattr(p, name) for p in parts]) for name in ("codes", "scales"))
    zeros = None if format.symmetric else np.concatenate([p.zero_points for p in parts])
    return Encoded(codes, scales, zeros, format)
