"""Ranges of the small integer tensors by which a graph states sizes, axes and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from penjing.backends.onnx.graph.index import get_attribute

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

SMALL = 1024
"""Tensors of more values are not followed: what depends on them has no bound."""
FURTHEST = float(2**62)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Every value of a small tensor lies between `low` and `high`, both of the tensor's shape.

    >>> (Interval.of([2, 3]) * Interval(np.array([0.0, 1.0]), np.array([4.0, 4.0]))).high
    array([ 8., 12.])
    """

    low: Floats
    high: Floats

    @classmethod
    def of(cls, values: Any) -> Interval:
        """Return the interval of values that are known."""
        exact = np.asarray(values, np.float64)
        return cls(exact, exact)

    @property
    def exact(self) -> bool:
        """Whether every value is known."""
        return bool((self.low == self.high).all())

    @property
    def bounded(self) -> bool:
        """Whether no value is infinite."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    def __mul__(self, other: Interval) -> Interval:
        return _corners(np.multiply, self, other)

    def each(self, change: Callable[[Floats], Any]) -> Interval:
        """Return the same movement of both ends: indexing, reshaping, or what never decreases."""
        return Interval(*(np.asarray(change(end), np.float64) for end in (self.low, self.high)))


def read_constant(tensor: TensorProto) -> Interval | None:
    """Return the values of a small constant, or None for a large one or one of strings."""
    if int(np.prod(tensor.dims, dtype=np.float64)) > SMALL or tensor.data_type == tensor.STRING:
        return None
    return Interval.of(np.asarray(numpy_helper.to_array(tensor)).astype(np.float64))


def evaluate_interval(
    node: NodeProto, given: list[Interval | None], shape: tuple[int, ...] | None, bits: int
) -> Interval | None:
    """Return the range of a node's first output, or None where nothing is known about it.

    Args:
        node: of a standard operator.
        given: ranges of its inputs; None for one that is not followed or not there.
        shape: of its first output.
        bits: of the integers in its first output; 1 for bool, 0 for floats.
    """
    if shape is None or int(np.prod(shape, dtype=np.float64)) > SMALL:
        return None
    rule = _RULES.get(node.op_type)
    if rule is None or not given or (given[0] is None and node.op_type != "Clip"):
        return None
    try:
        with np.errstate(all="ignore"):
            found = rule(node, cast("Given", given))
            if found is None:
                return None
            if bits == 1:
                return (
                    Interval.of(found.low != 0) if found.exact else Interval(np.zeros(shape), np.ones(shape))
                )
            if bits:
                found = found.each(np.trunc)
            ends = (found.low, found.high)
            if bits and any((np.abs(end[np.isfinite(end)]) > 2.0 ** (bits - 1)).any() for end in ends):
                return None  # it wraps around
            return Interval(
                *(
                    end.reshape(shape) if end.size == np.prod(shape) else np.broadcast_to(end, shape)
                    for end in ends
                )
            )
    except (ValueError, IndexError, TypeError, AttributeError):
        return None


def _shaped(end: Floats, shape: tuple[int, ...]) -> Floats:
    return end.reshape(shape) if end.size == np.prod(shape) else np.broadcast_to(end, shape)


Given = list[Interval]
"""Ranges of a node's inputs. One that is missing raises, and then nothing is known of the output."""


def _corners(operator: Callable[[Floats, Floats], Floats], a: Interval, b: Interval) -> Interval:
    """Return the range of a function that is monotone in each argument, from its values at the corners."""
    found = [operator(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = np.minimum.reduce(found), np.maximum.reduce(found)
    lost = np.isnan(low) | np.isnan(high)
    return Interval(np.where(lost, -np.inf, low), np.where(lost, np.inf, high))


def _add(node: NodeProto, given: Given) -> Interval:
    return Interval(given[0].low + given[1].low, given[0].high + given[1].high)


def _subtract(node: NodeProto, given: Given) -> Interval:
    return Interval(given[0].low - given[1].high, given[0].high - given[1].low)


def _divide(node: NodeProto, given: Given) -> Interval | None:
    crosses = (given[1].low <= 0) & (given[1].high >= 0)
    return None if crosses.any() else _corners(np.divide, given[0], given[1])


def _remainder(node: NodeProto, given: Given) -> Interval | None:
    if given[0].exact and given[1].exact and (given[1].low != 0).all():
        function = np.fmod if get_attribute(node, "fmod", 0) else np.mod
        return Interval.of(function(given[0].low, given[1].low))
    size = np.maximum(np.abs(given[1].low), np.abs(given[1].high))
    return Interval(-size, size)


def _extreme(function: Callable[[Floats, Floats], Floats]) -> Callable[[NodeProto, Given], Interval]:
    def rule(node: NodeProto, given: Given) -> Interval:
        found = given[0]
        for other in given[1:]:
            found = Interval(function(found.low, other.low), function(found.high, other.high))
        return Interval(found.low, found.high)

    return rule


def _clip(node: NodeProto, given: Given) -> Interval:
    low, high = (given[i] if len(given) > i and given[i] else None for i in (1, 2))
    start = -np.inf if low is None else low.low
    end = np.inf if high is None else high.high
    inner = given[0] or Interval(np.asarray(-np.inf), np.asarray(np.inf))
    return inner.each(lambda values: np.clip(values, start, end))


def _choose(node: NodeProto, given: Given) -> Interval:
    condition, yes, no = given
    if condition.exact:
        return Interval(*(np.where(condition.low, a, b) for a, b in ((yes.low, no.low), (yes.high, no.high))))
    return Interval(np.minimum(yes.low, no.low), np.maximum(yes.high, no.high))


def _compare(function: Callable[..., Any]) -> Callable[[NodeProto, Given], Interval]:
    def rule(node: NodeProto, given: Given) -> Interval:
        if all(entry.exact for entry in given):
            return Interval.of(function(*(entry.low for entry in given)))
        return Interval(np.asarray(0.0), np.asarray(1.0))

    return rule


def _whole(known: Interval) -> NDArray[np.int64]:
    return np.clip(known.low, -FURTHEST, FURTHEST).astype(np.int64)


def _gather(node: NodeProto, given: Given) -> Interval | None:
    if not given[1].exact:
        return None
    axis = get_attribute(node, "axis", 0)
    return given[0].each(lambda values: np.take(values, _whole(given[1]), axis=axis))


def _join(node: NodeProto, given: Given) -> Interval:
    axis = get_attribute(node, "axis", 0)
    return Interval(*(np.concatenate([getattr(g, end) for g in given], axis) for end in ("low", "high")))


def _slice(node: NodeProto, given: Given) -> Interval | None:
    if len(given) < 3 or not all(entry.exact for entry in given[1:]):
        return None
    starts, ends = (_whole(entry).ravel() for entry in given[1:3])
    axes = _whole(given[3]).ravel() if len(given) > 3 else np.arange(len(starts))
    steps = _whole(given[4]).ravel() if len(given) > 4 else np.ones(len(starts), np.int64)
    cut: list[Any] = [slice(None)] * given[0].low.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(int(start), None if step < 0 and end <= -FURTHEST else int(end), int(step))
    return given[0].each(lambda values: values[tuple(cut)])


def _reduce(function: Callable[..., Any]) -> Callable[[NodeProto, Given], Interval | None]:
    def rule(node: NodeProto, given: Given) -> Interval | None:
        whole = given[0].low.ndim == 1 or given[0].low.size == 1
        if not whole or (function is np.prod and (given[0].low < 0).any()):
            return None
        keep = bool(get_attribute(node, "keepdims", 1))
        return given[0].each(lambda values: function(values, keepdims=keep))

    return rule


def _reshape(node: NodeProto, given: Given) -> Interval:
    return given[0].each(np.ravel)


def _same(node: NodeProto, given: Given) -> Interval:
    return Interval(given[0].low, given[0].high)


def _each(function: Callable[[Floats], Floats]) -> Callable[[NodeProto, Given], Interval]:
    return lambda node, given: given[0].each(function)


_RULES: dict[str, Callable[[NodeProto, Given], Interval | None]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": lambda node, given: given[0] * given[1],
    "Div": _divide,
    "Mod": _remainder,
    "Min": _extreme(np.minimum),
    "Max": _extreme(np.maximum),
    "Clip": _clip,
    "Where": _choose,
    "Equal": _compare(np.equal),
    "Less": _compare(np.less),
    "LessOrEqual": _compare(np.less_equal),
    "Greater": _compare(np.greater),
    "GreaterOrEqual": _compare(np.greater_equal),
    "Not": _compare(np.logical_not),
    "And": _compare(np.logical_and),
    "Or": _compare(np.logical_or),
    "Gather": _gather,
    "Concat": _join,
    "Slice": _slice,
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Neg": lambda node, given: Interval(-given[0].high, -given[0].low),
    "Floor": _each(np.floor),
    "Ceil": _each(np.ceil),
    "Round": _each(np.round),
    "Sqrt": _each(np.sqrt),
    "Relu": _each(lambda values: np.maximum(values, 0)),
    "Cast": _same,
    "Identity": _same,
    "Expand": _same,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Reshape": _reshape,
    "Flatten": _reshape,
}
"""What each operator makes of ranges; one that is not here makes values of which nothing is known."""
