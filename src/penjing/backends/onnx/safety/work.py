"""How much work one node is, in multiply-adds or values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penjing.backends.onnx.graph.index import get_attribute
from penjing.backends.onnx.safety.sizes import Bound

if TYPE_CHECKING:
    from onnx import NodeProto


def count_work(node: NodeProto, given: Sequence[Bound | None], made: Sequence[Bound]) -> float:
    """Return the multiply-adds of products, and the values read and written by other operators.

    >>> from onnx import helper
    >>> from penjing.backends.onnx.safety.sizes import bound_of
    >>> node = helper.make_node("MatMul", ["a", "b"], ["c"])
    >>> count_work(node, [bound_of(1, (2, 3)), bound_of(1, (3, 5))], [bound_of(1, (2, 5))])
    30.0
    """
    out = sum(bound.count for bound in made)
    taken = [entry for entry in given if entry is not None]
    shapes = [entry.shape for entry in taken]
    first = shapes[0] if shapes else None
    second = shapes[1] if len(shapes) > 1 else None
    if node.op_type in ("MatMul", "MatMulInteger", "MatMulNBits", "Gemm", "QLinearMatMul") and first:
        return float(out * first[0 if get_attribute(node, "transA", 0) else -1])
    if node.op_type in ("Conv", "ConvInteger") and second:
        return out * math.prod(second[1:])
    if node.op_type == "ConvTranspose" and second:
        return taken[0].count * math.prod(second[1:])
    if node.op_type == "Einsum":
        return _einsum(node, taken)
    if node.op_type in ("LSTM", "GRU", "RNN") and first and second:
        return math.prod(first[:2]) * taken[1].count + taken[0].count
    window = get_attribute(node, "kernel_shape", [1])
    samples = max(1, int(get_attribute(node, "sampling_ratio", 1))) ** 2
    return float((out + sum(entry.count for entry in taken)) * math.prod(window) * samples)


def _einsum(node: NodeProto, taken: Sequence[Bound]) -> float:
    """Multiply the lengths of all letters; where the shapes are not known, the sizes of all operands."""
    terms = str(get_attribute(node, "equation", "")).replace(" ", "").partition("->")[0].split(",")
    lengths: dict[str, int] = {}
    for term, entry in zip(terms, taken, strict=False):
        if entry.shape is None or "." in term or len(term) != len(entry.shape):
            return math.prod(max(part.count, 1.0) for part in taken)
        for letter, size in zip(term, entry.shape, strict=True):
            lengths[letter] = max(size, lengths.get(letter, 0))
    return float(math.prod(lengths.values()))
