"""How large the tensors that one node makes can be, given what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from penjing.backends.onnx.graph.index import get_attribute
from penjing.backends.onnx.safety.intervals import Interval, evaluate_interval, read_constant

if TYPE_CHECKING:
    from onnx import NodeProto, OperatorSetIdProto, TypeProto

Shape = tuple[int, ...]

_SIZED: dict[str, tuple[int, ...]] = {
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Tile": (1,),
    "Pad": (1,),
    "Resize": (2, 3),
    "Upsample": (1,),
    "OneHot": (1,),
    "TopK": (1,),
    "HannWindow": (0,),
    "HammingWindow": (0,),
    "BlackmanWindow": (0,),
    "MaxUnpool": (2,),
    "CenterCropPad": (1,),
    "AffineGrid": (1,),
    "Col2Im": (1,),
    "DFT": (1,),
}
"""Operators whose output grows with the values of an input, and which: the largest that they can be count."""
_WITHIN_NAMES = """
Slice TopK Split Compress Unique ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceL1 ReduceL2
ReduceLogSum ReduceLogSumExp ReduceSumSquare Dropout GroupNormalization Squeeze Unsqueeze CastLike
MeanVarianceNormalization Trilu
"""
_WITHIN = frozenset(_WITHIN_NAMES.split())
"""Operators whose outputs have no more values than their first input."""
_BROADCAST_NAMES = """
Add Sub Mul Div Pow Mod Min Max Sum Mean Where And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual
PRelu BitwiseAnd BitwiseOr BitwiseXor BitShift
"""
_BROADCAST = frozenset(_BROADCAST_NAMES.split())
"""Operators whose operands are broadcast to one shape."""
_KEEP_NAMES = """
BiasGelu FastGelu Gelu QuickGelu LayerNormalization SkipLayerNormalization SimplifiedLayerNormalization
SkipSimplifiedLayerNormalization RotaryEmbedding QLinearSigmoid QLinearLeakyRelu QLinearSoftmax
BiasSoftmax BiasAdd FusedConv QLinearAdd QLinearMul QuantizeLinear DequantizeLinear
"""
_KEEP = frozenset(_KEEP_NAMES.split())
"""Operators of ONNX Runtime that give a tensor of the shape of their first input."""


@dataclass(frozen=True)
class Bound:
    """The most that a tensor can be.

    Attributes:
        kind: ONNX's number of its element type; 0 where it is not known.
        shape: the longest that each axis can be; None where not even the rank is known.
        count: the most values that it can have; infinite where there is no bound.
        varies: whether it can be smaller.
        value: the range of each value of a small tensor.
        constant: whether it is the same for all inputs, so that a runtime may compute it while loading.
    """

    kind: int
    shape: Shape | None
    count: float
    varies: bool = False
    value: Interval | None = None
    constant: bool = False

    @property
    def bytes(self) -> float:
        """The most memory that the tensor can take."""
        return self.count * _width(self.kind)


def bound_of(kind: int, shape: Shape, value: Interval | None = None, constant: bool = False) -> Bound:
    """Return the bound of a tensor of a known shape."""
    return Bound(kind, shape, float(math.prod(shape)), value=value, constant=constant)


@lru_cache(maxsize=64)
def _width(kind: int) -> float:
    if kind == onnx.TensorProto.STRING:
        return 64.0
    try:
        return float(np.dtype(helper.tensor_dtype_to_np_dtype(kind)).itemsize)
    except KeyError:
        return 8.0


class CannotInfer(Exception):
    """ONNX's own inference refuses a node: its inputs do not fit it."""


def infer_bounds(
    node: NodeProto, given: Sequence[Bound | None], opsets: Sequence[OperatorSetIdProto]
) -> list[Bound]:
    """Return a bound for each output of a node without graphs inside.

    Shapes are ONNX's own inference, made with the longest axes and the largest sizes that the inputs can
    have. Where it does not know, because it lacks a value, a rule for the operator may.

    Raises:
        CannotInfer: the inputs do not fit the node.
    """
    taken = [entry for entry in given if entry is not None]
    constant = all(entry.constant for entry in taken) and not node.op_type.startswith(("Random", "Bernoulli"))
    varies = any(entry.varies for entry in taken)
    if any(math.isinf(entry.count) for entry in taken):
        return [Bound(0, None, math.inf, varies, constant=constant) for _ in node.output]
    if node.domain not in ("", "ai.onnx"):
        outputs = _foreign(node, given)
    else:
        known, loose = _values(node, given)
        varies |= loose
        outputs = _standard(node, given, known, opsets)
    return [
        Bound(
            out.kind,
            out.shape,
            out.count,
            varies or out.varies,
            out.value if out.value is not None else _value(node, given, out, index),
            constant,
        )
        for index, out in enumerate(outputs)
    ]


def _value(node: NodeProto, given: Sequence[Bound | None], out: Bound, index: int) -> Interval | None:
    if index or out.shape is None or node.domain not in ("", "ai.onnx"):
        return None
    first = given[0] if given else None
    if node.op_type in ("Shape", "Size") and first is not None and first.shape is not None:
        return _measured(node, first)
    if node.op_type in ("ArgMax", "ArgMin") and first is not None and first.shape and out.count <= 1024:
        longest = first.shape[get_attribute(node, "axis", 0) % len(first.shape)]
        return Interval(np.zeros(out.shape), np.full(out.shape, float(max(longest - 1, 0))))
    if node.op_type == "ConstantOfShape" and out.count <= 1024:
        fill = get_attribute(node, "value", None)
        return Interval.of(np.full(out.shape, 0.0 if fill is None else _scalar(fill)))
    if node.op_type == "Constant":
        return _constant(node)
    ranges = [None if entry is None else entry.value for entry in given]
    return evaluate_interval(node, ranges, out.shape, _bits(out.kind))


def _constant(node: NodeProto) -> Interval | None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            return read_constant(attribute.t)
        if attribute.name in ("value_int", "value_float", "value_ints", "value_floats"):
            return Interval.of(helper.get_attribute_value(attribute))
    return None


def _scalar(fill: Any) -> float:
    return float(np.asarray(numpy_helper.to_array(fill)).reshape(-1)[0])


def _measured(node: NodeProto, first: Bound) -> Interval:
    assert first.shape is not None
    if node.op_type == "Size":
        return Interval(np.asarray(0.0 if first.varies else first.count), np.asarray(first.count))
    start, end = get_attribute(node, "start", 0), get_attribute(node, "end", len(first.shape))
    high = np.array(first.shape[start:end], np.float64)
    return Interval(np.zeros_like(high) if first.varies else high, high)


def _bits(kind: int) -> int:
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    except KeyError:
        return 0
    if dtype.kind == "b":
        return 1
    return 8 * dtype.itemsize if dtype.kind in "iu" else 0


def _values(node: NodeProto, given: Sequence[Bound | None]) -> tuple[dict[str, onnx.TensorProto], bool]:
    """Return values of inputs for ONNX's inference, and whether some are the largest of several."""
    found: dict[str, onnx.TensorProto] = {}
    loose = False
    for index, (name, entry) in enumerate(zip(node.input, given, strict=True)):
        value = None if entry is None else entry.value
        if entry is None or value is None:
            continue
        if not value.exact:
            if index not in _SIZED.get(node.op_type, ()) or not value.bounded:
                continue
            loose = True
        found[name] = _tensor(name, value, entry.kind)
    return found, loose


def _tensor(name: str, value: Interval, kind: int) -> onnx.TensorProto:
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind)) if _bits(kind) or kind else np.dtype(np.int64)
    high = value.high
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        high = np.clip(high, float(limits.min), float(limits.max) - (1024 if dtype.itemsize == 8 else 0))
    return numpy_helper.from_array(np.ascontiguousarray(high.astype(dtype)), name)


def _standard(
    node: NodeProto,
    given: Sequence[Bound | None],
    known: dict[str, onnx.TensorProto],
    opsets: Sequence[OperatorSetIdProto],
) -> list[Bound]:
    if node.op_type in _OWN:
        first = _OWN[node.op_type](node, given)
        counts = Bound(onnx.TensorProto.INT64, None, first.count, varies=True)
        return [first, *(counts if node.op_type == "Unique" else first for _ in node.output[1:])]
    version = max((o.version for o in opsets if o.domain in ("", "ai.onnx")), default=1)
    if node.op_type in _SIZED and any(
        index < len(node.input) and node.input[index] and node.input[index] not in known
        for index in _SIZED[node.op_type]
        if node.op_type not in ("TopK", "Resize")
    ):
        return [_unbounded() for _ in node.output]
    types = {name: _type_of(entry) for name, entry in zip(node.input, given, strict=True) if name and entry}
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
        inferred = onnx.shape_inference.infer_node_outputs(schema, node, types, known, opset_imports=opsets)
    except Exception as error:  # noqa: BLE001  ONNX raises several kinds, not all of them public
        return [_fallback(node, given, error) for _ in node.output]
    return [_complete(node, given, index, inferred.get(name)) for index, name in enumerate(node.output)]


def _type_of(entry: Bound) -> TypeProto:
    return helper.make_tensor_type_proto(entry.kind or onnx.TensorProto.FLOAT, entry.shape)


def _unbounded() -> Bound:
    return Bound(0, None, math.inf)


def _fallback(node: NodeProto, given: Sequence[Bound | None], error: Exception) -> Bound:
    """Bound a node whose inputs can be smaller than their bounds, so that these need not fit together."""
    taken = [entry for entry in given if entry is not None]
    if node.op_type in _BROADCAST and any(entry.varies for entry in taken):
        return _broadcast(taken)
    raise CannotInfer(f"{node.op_type}: {str(error).strip().partition(chr(10))[0][:200]}") from error


def _broadcast(taken: Sequence[Bound]) -> Bound:
    shapes = [entry.shape for entry in taken]
    if any(shape is None for shape in shapes):
        count = math.prod(max(entry.count, 1.0) for entry in taken)
        return Bound(taken[-1].kind, None, count, varies=True)
    rank = max(len(shape) for shape in shapes if shape is not None)
    longest = tuple(
        max(shape[axis - rank] for shape in shapes if shape is not None and len(shape) >= rank - axis)
        for axis in range(rank)
    )
    return Bound(taken[-1].kind, longest, float(math.prod(longest)), varies=True)


def _complete(node: NodeProto, given: Sequence[Bound | None], index: int, found: TypeProto | None) -> Bound:
    """Return the bound that inference found, or what a rule makes of what is missing."""
    if found is not None and found.HasField("tensor_type"):
        tensor = found.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        if tensor.HasField("shape") and None not in dims:
            return bound_of(tensor.elem_type, tuple(max(0, dim) for dim in dims if dim is not None))
        kind = tensor.elem_type
    else:
        dims, kind = [], 0
    taken = [entry for entry in given if entry is not None]
    first = taken[0] if taken else None
    if first is None:
        return _unbounded()
    if node.op_type in _WITHIN:
        same = first.shape is not None and len(first.shape) == len(dims)
        shape = tuple(
            longest if dim is None else dim for dim, longest in zip(dims, first.shape or (), strict=False)
        )
        # A sum over an axis of length 0 is not empty.
        most = float(math.prod(max(axis, 1) for axis in first.shape)) if first.shape else first.count
        return Bound(kind, shape if same else None, max(most, first.count), varies=True)
    if node.op_type in _BROADCAST:
        return _broadcast(taken)
    if len(taken) == 1 and first.shape is None and node.op_type not in _SIZED:
        return Bound(kind or first.kind, None, first.count, varies=True)
    return _unbounded()


def _range(node: NodeProto, given: Sequence[Bound | None]) -> Bound:
    start, limit, step = (None if entry is None else entry.value for entry in given)
    kind = given[0].kind if given[0] is not None else 0
    if start is None or limit is None or step is None or not ((step.low > 0).all() or (step.high < 0).all()):
        return _unbounded()
    if (step.low > 0).all():
        most = (limit.high - start.low) / step.low
    else:
        most = (start.high - limit.low) / -step.high
    length = float(np.ceil(most.reshape(-1)[0]))
    if not math.isfinite(length):
        return _unbounded()
    exact = start.exact and limit.exact and step.exact
    length = max(0.0, length)
    value = None
    if exact and length <= 1024:
        value = Interval.of(start.low + step.low * np.arange(int(length)))
    return Bound(kind, (int(length),), length, varies=not exact, value=value)


def _reshape(node: NodeProto, given: Sequence[Bound | None]) -> Bound:
    """Bound each axis of a tensor that is reshaped: all together they hold what it holds."""
    first = given[0]
    assert first is not None
    target = given[1].value if len(given) > 1 and given[1] is not None else None
    if len(given) == 1:
        target = Interval.of(np.asarray(get_attribute(node, "shape", []), np.float64))
    if target is None:
        return Bound(first.kind, None, first.count, varies=True)
    zero_copies = not get_attribute(node, "allowzero", 0)
    axes: list[float] = []
    for axis, (low, high) in enumerate(zip(target.low.ravel(), target.high.ravel(), strict=True)):
        copied = zero_copies and low <= 0 <= high and first.shape is not None and axis < len(first.shape)
        most = max(high, float(first.shape[axis]) if copied and first.shape is not None else 0.0)
        axes.append(first.count if low < 0 else min(most, first.count) if not first.varies else most)
    free = [axis for axis, low in enumerate(target.low.ravel()) if low < 0]
    rest = math.prod(size for axis, size in enumerate(axes) if axis not in free)
    exact = target.exact and not first.varies
    if len(free) == 1 and target.exact:
        axes[free[0]] = math.floor(first.count / rest) if rest else 0.0
    if exact and math.prod(axes) != first.count:
        raise CannotInfer(f"Reshape: {first.count:g} values do not fit {[int(axis) for axis in axes]}")
    value = first.value
    return Bound(
        first.kind,
        tuple(int(axis) for axis in axes),
        first.count,
        varies=not exact,
        value=value.each(lambda end: end.reshape([int(axis) for axis in axes])) if exact and value else None,
    )


def _non_zero(node: NodeProto, given: Sequence[Bound | None]) -> Bound:
    first = given[0]
    assert first is not None
    rank = 1 if first.shape is None else max(1, len(first.shape))
    shape = (rank, int(first.count))
    return Bound(onnx.TensorProto.INT64, shape, float(math.prod(shape)), varies=True)


def _suppression(node: NodeProto, given: Sequence[Bound | None]) -> Bound:
    scores = given[1]
    rows = math.inf if scores is None else scores.count
    return Bound(onnx.TensorProto.INT64, (int(rows), 3), 3 * rows, varies=True)


def _flat_unless_axis(node: NodeProto, given: Sequence[Bound | None]) -> Bound:
    first = given[0]
    assert first is not None
    if get_attribute(node, "axis", None) is None or first.shape is None:
        return Bound(first.kind, (int(first.count),), first.count, varies=True)
    return Bound(first.kind, first.shape, first.count, varies=True)


def _total(node: NodeProto, given: Sequence[Bound | None]) -> Bound:
    """Bound a sequence, or what is taken from one, by all values together."""
    taken = [entry for entry in given if entry is not None]
    kind = next((entry.kind for entry in taken if entry.kind), 0)
    return Bound(kind, None, sum(entry.count for entry in taken), varies=True)


def _length(node: NodeProto, given: Sequence[Bound | None]) -> Bound:
    most = sum(entry.count for entry in given if entry is not None)
    return Bound(
        onnx.TensorProto.INT64, (), 1.0, value=Interval(np.asarray(0.0), np.asarray(most)), varies=False
    )


_OWN: dict[str, Callable[[Any, Sequence[Bound | None]], Bound]] = {
    "Range": _range,
    "Reshape": _reshape,
    "NonZero": _non_zero,
    "NonMaxSuppression": _suppression,
    "Compress": _flat_unless_axis,
    "Unique": _flat_unless_axis,
    "SequenceConstruct": _total,
    "SequenceInsert": _total,
    "SequenceErase": _total,
    "SequenceAt": _total,
    "SplitToSequence": _total,
    "ConcatFromSequence": _total,
    "Optional": _total,
    "OptionalGetElement": _total,
    "SequenceEmpty": lambda node, given: Bound(0, None, 0.0, varies=True),
    "SequenceLength": _length,
    "StringConcat": lambda node, given: _unbounded(),
    "StringSplit": lambda node, given: _unbounded(),
    "StringNormalizer": _total,
}
"""Operators whose outputs are bounded without ONNX's inference, which lacks their values or has no bound."""


def _foreign(node: NodeProto, given: Sequence[Bound | None]) -> list[Bound]:
    """Bound operators of ONNX Runtime, and of the classical models of `ai.onnx.ml`."""
    first = given[0] if given else None
    if first is None:
        return [_unbounded() for _ in node.output]
    if node.domain == "ai.onnx.ml":
        longest = max((_entries(attribute) for attribute in node.attribute), default=0)
        return [Bound(0, None, first.count * max(1, longest), varies=True) for _ in node.output]
    if node.op_type == "MatMulNBits" and first.shape is not None:
        return [bound_of(first.kind, (*first.shape[:-1], int(get_attribute(node, "N", 0))))]
    if node.op_type == "GatherBlockQuantized" and first.shape is not None and given[1] is not None:
        packed = 8 // int(get_attribute(node, "bits", 4))
        rows, width = given[1].shape or (), first.shape[-1] * packed
        return [bound_of(onnx.TensorProto.FLOAT, (*rows, width))]
    if node.op_type in _KEEP and first.shape is not None:
        return [bound_of(first.kind, first.shape) for _ in node.output]
    return [_unbounded() for _ in node.output]


def _entries(attribute: onnx.AttributeProto) -> int:
    return max(len(attribute.ints), len(attribute.floats), len(attribute.strings))
