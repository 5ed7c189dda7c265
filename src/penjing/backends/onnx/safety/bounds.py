"""The memory and work that running a model can take, found before anything runs it.

Every tensor's largest size is carried through the graph, with the values of the small integer tensors that
state sizes. What cannot be bounded so is found too, such as a size or a count of iterations that depends on
the values of the inputs: it runs only in a process with a limit on its memory, or where the user trusts the
file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnx.inliner

from penjing.backends.onnx.graph.index import get_attribute, list_node_inputs
from penjing.backends.onnx.safety.intervals import Interval, read_constant
from penjing.backends.onnx.safety.sizes import Bound, CannotInfer, bound_of, infer_bounds
from penjing.backends.onnx.safety.work import count_work
from penjing.core.errors import Refused
from penjing.core.memory_limit import (
    EXAMPLES,
    LARGEST_PEAK,
    LARGEST_UNFOLDED,
    MOST_STEPS,
    TRUST,
    UNFOLDED_SHARE,
)

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

MOST_WORK = 2**44
"""Multiply-adds (and values of other operators) of one call, for a few examples."""
MOST_CONSTANT_WORK = 2**36
"""The same of what does not depend on the inputs, and is computed while a runtime loads the model."""


class TooLarge(Exception):
    """What a call would take, and where."""


@dataclass
class _Account:
    """What a walk has found so far."""

    live: float = 0.0
    peak: float = 0.0
    unfolded: float = 0.0
    work: float = 0.0
    constant_work: float = 0.0
    steps: float = 0.0
    unbounded: str = ""
    weights: float = 0.0


@dataclass(frozen=True)
class _Scope:
    """The names that a graph sees: its own and those of the graphs around it."""

    bounds: dict[str, Bound]
    opsets: Sequence[onnx.OperatorSetIdProto]
    account: _Account
    times: float = 1.0
    """How often the graph is run."""

    def inside(self, times: float = 1.0) -> _Scope:
        """Return the scope of a graph inside a node, which is run so many times."""
        return _Scope(dict(self.bounds), self.opsets, self.account, self.times * times)


def check_bounds(proto: ModelProto, place: str) -> str:
    """Refuse a model whose call must take more memory or work than any use of it would.

    Args:
        proto: checked for functions that multiply; it is not changed.
        place: the file, for the message.

    Returns:
        why the model has no bound, as a clause; empty where it has one.

    Raises:
        Refused: the model has a bound, and it is beyond `LARGEST_PEAK`, `MOST_WORK` or another of them; or
            ONNX's inference fits no sizes to it.
    """
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    failed = ""
    for first, other in EXAMPLES:
        try:
            return _walk_model(proto, first, other)
        except CannotInfer as error:
            failed = failed or str(error)
        except TooLarge as error:
            raise Refused(
                "must need no more memory and work than a model would", value=error, place=place, fix=TRUST
            ) from None
    return f"its shapes cannot be inferred ({failed})"


def _walk_model(proto: ModelProto, first: int, other: int) -> str:
    account = _Account()
    scope = _Scope({}, proto.opset_import, account)
    named: dict[str, int] = {}
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name not in weights:
            bound = _declared(value, first, other, named)
            scope.bounds[value.name] = bound
            if math.isinf(bound.count):
                account.unbounded = f"the input {value.name!r} states no shape"
    account.live = sum(_finite(bound.bytes) for bound in scope.bounds.values())
    _walk(proto.graph, scope)
    return account.unbounded


def _declared(value: ValueInfoProto, first: int, other: int, named: dict[str, int]) -> Bound:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return Bound(tensor.elem_type, None, math.inf)
    shape = []
    for axis, dim in enumerate(tensor.shape.dim):
        size = dim.dim_value if dim.HasField("dim_value") else first if axis == 0 else other
        shape.append(named.setdefault(dim.dim_param, size) if dim.dim_param else size)
    return bound_of(tensor.elem_type, tuple(max(0, size) for size in shape))


def _walk(graph: GraphProto, scope: _Scope) -> list[Bound]:
    """Bound every tensor of a graph, and return the bounds of its outputs."""
    _add_weights(graph, scope)
    outputs = [value.name for value in graph.output]
    last = {name: index for index, node in enumerate(graph.node) for name in list_node_inputs(node)}
    last |= {name: len(graph.node) for name in outputs}
    own: set[str] = set()
    for index, node in enumerate(graph.node):
        made = _bound_node(node, scope)
        for name, bound in zip(node.output, made, strict=True):
            if name:
                scope.bounds[name] = bound
                own.add(name)
        _count(node, made, scope)
        for name in {*list_node_inputs(node), *node.output} & own:
            if last.get(name, -1) <= index:
                own.discard(name)
                scope.account.live -= _finite(scope.bounds[name].bytes)
    found = [scope.bounds.get(name, Bound(0, None, math.inf)) for name in outputs]
    scope.account.live -= sum(_finite(scope.bounds[name].bytes) for name in own)
    return found


def _add_weights(graph: GraphProto, scope: _Scope) -> None:
    for tensor in graph.initializer:
        bound = bound_of(tensor.data_type, tuple(tensor.dims), read_constant(tensor), constant=True)
        scope.account.weights += bound.bytes
        scope.bounds[tensor.name] = bound
    for sparse in graph.sparse_initializer:
        bound = bound_of(sparse.values.data_type, tuple(sparse.dims), constant=True)
        _unfold(bound, f"the sparse tensor {sparse.values.name!r}", scope)
        scope.bounds[sparse.values.name] = bound


def _finite(size: float) -> float:
    return size if math.isfinite(size) else 0.0


def _bound_node(node: NodeProto, scope: _Scope) -> list[Bound]:
    if node.op_type in _WITH_GRAPHS and node.domain in ("", "ai.onnx"):
        return _WITH_GRAPHS[node.op_type](node, scope)
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return _give_up(node, scope, f"{node.op_type} runs a graph")
    given = [_seen(name, scope) if name else None for name in node.input]
    made = infer_bounds(node, given, scope.opsets)
    lost = any(name and math.isinf(bound.count) for name, bound in zip(node.output, made, strict=True))
    if lost and not any(entry is not None and math.isinf(entry.count) for entry in given):
        return _give_up(node, scope, f"the size of what {node.op_type} makes depends on values")
    return made


def _seen(name: str, scope: _Scope) -> Bound:
    if name not in scope.bounds:
        raise CannotInfer(f"no tensor {name!r}")
    return scope.bounds[name]


def _give_up(node: NodeProto, scope: _Scope, why: str) -> list[Bound]:
    scope.account.unbounded = scope.account.unbounded or f"{why} (node {node.name or node.output[0]!r})"
    return [Bound(0, None, math.inf) for _ in node.output]


def _count(node: NodeProto, made: Sequence[Bound], scope: _Scope) -> None:
    """Add what a node takes to the account, and stop where it is too much."""
    account = scope.account
    where = f"{node.op_type} (node {node.name or node.output[0]!r})"
    size = sum(_finite(bound.bytes) for bound in made)
    account.live += size
    account.peak = max(account.peak, account.live)
    _require(account.live, LARGEST_PEAK, "bytes at once", where)
    given = [scope.bounds.get(name) for name in node.input]
    work = _finite(count_work(node, given, made)) * scope.times
    stored = node.op_type == "Constant" and not any(a.name == "sparse_value" for a in node.attribute)
    constant = bool(made) and all(bound.constant for bound in made) and not stored
    if constant:
        account.unfolded += size
        account.constant_work += work
        limit = max(LARGEST_UNFOLDED, UNFOLDED_SHARE * account.weights)
        _require(account.unfolded, limit, "bytes of constants that it unfolds to", where)
        _require(account.constant_work, MOST_CONSTANT_WORK, "multiply-adds on constants", where)
    account.work += work
    account.steps += scope.times
    _require(account.work, MOST_WORK, "multiply-adds in one call", where)
    _require(account.steps, MOST_STEPS, "nodes run in one call", where)


def _unfold(bound: Bound, what: str, scope: _Scope) -> None:
    scope.account.unfolded += bound.bytes
    _require(scope.account.unfolded, LARGEST_UNFOLDED, "bytes of constants that it unfolds to", what)


def _require(found: float, limit: float, unit: str, where: str) -> None:
    if found > limit:
        raise TooLarge(f"{found:.3g} {unit} for {limit:.3g}, in {where}")


def _bind(names: Iterable[ValueInfoProto], bounds: Iterable[Bound], scope: _Scope) -> None:
    scope.bounds.update({value.name: bound for value, bound in zip(names, bounds, strict=False)})


def _branches(node: NodeProto, scope: _Scope) -> list[Bound]:
    """Bound the outputs of an If by the larger branch, and count both."""
    found = [_walk(attribute.g, scope.inside()) for attribute in node.attribute if attribute.HasField("g")]
    return [_larger(pair) for pair in zip(*found, strict=False)] or _give_up(node, scope, "an If is empty")


def _larger(bounds: Sequence[Bound]) -> Bound:
    most = max(bounds, key=lambda bound: bound.count)
    shapes = {bound.shape for bound in bounds}
    if len(shapes) == 1:
        varies = any(bound.varies for bound in bounds)
        return Bound(most.kind, most.shape, most.count, varies=varies)
    ranks = {None if shape is None else len(shape) for shape in shapes}
    if len(ranks) > 1 or None in ranks:
        return Bound(most.kind, None, most.count, varies=True)
    longest = tuple(max(axis) for axis in zip(*(shape or () for shape in shapes), strict=True))
    return Bound(most.kind, longest, float(math.prod(longest)), varies=True)


def _loop(node: NodeProto, scope: _Scope) -> list[Bound]:
    """Bound a Loop whose trip count is bounded and whose state keeps its size."""
    body = get_attribute(node, "body", None)
    trips = _seen(node.input[0], scope).value if node.input[0] else None
    count = math.inf if trips is None else max(0.0, float(trips.high.max(initial=0.0)))
    state = [_forget(_seen(name, scope)) for name in node.input[2:]]
    endless = count > MOST_STEPS
    inside = scope.inside(1.0 if endless else max(count, 1.0))
    # The body runs only while the condition holds.
    holds = bound_of(onnx.TensorProto.BOOL, (), Interval.of(1.0))
    _bind(body.input, [bound_of(onnx.TensorProto.INT64, ()), holds, *state], inside)
    goes_on, *made = _walk(body, inside)
    if endless:
        certain = not node.input[0] or (trips is not None and trips.low.max(initial=0) > MOST_STEPS)
        if certain and goes_on.value is not None and goes_on.value.low.all():
            where = f"node {node.name or node.output[0]!r}"
            raise TooLarge(f"a Loop of {count:g} iterations for {MOST_STEPS:.3g} ({where})")
        return _give_up(node, scope, "a Loop has no bound on its iterations")
    if not _is_stable(state, made[: len(state)]):
        return _give_up(node, scope, "the state of a Loop grows")
    return [*state, *(_stacked(bound, count, exact=False) for bound in made[len(state) :])]


def _scan(node: NodeProto, scope: _Scope) -> list[Bound]:
    """Bound a Scan over axis 0 of its inputs, whose state keeps its size."""
    body, scanned = get_attribute(node, "body", None), int(get_attribute(node, "num_scan_inputs", 0))
    given = [_seen(name, scope) for name in node.input if name]
    state, slices = [_forget(entry) for entry in given[:-scanned]], given[-scanned:]
    axes = get_attribute(node, "scan_input_axes", [0] * scanned)
    if not scanned or any(entry.shape is None for entry in slices):
        return _give_up(node, scope, "a Scan has no bound on its iterations")
    shapes = [entry.shape or () for entry in slices]
    count = float(max(shape[axis] for shape, axis in zip(shapes, axes, strict=True)))
    inside = scope.inside(max(count, 1.0))
    parts = [
        bound_of(entry.kind, tuple(size for index, size in enumerate(shape) if index != axis % len(shape)))
        for entry, shape, axis in zip(slices, shapes, axes, strict=True)
    ]
    _bind(body.input, [*state, *parts], inside)
    made = _walk(body, inside)
    if not _is_stable(state, made[: len(state)]):
        return _give_up(node, scope, "the state of a Scan grows")
    return [*state, *(_stacked(bound, count, exact=True) for bound in made[len(state) :])]


def _forget(bound: Bound) -> Bound:
    """Return the bound of a state whose values change from one iteration to the next."""
    return Bound(bound.kind, bound.shape, bound.count, bound.varies)


def _is_stable(before: Sequence[Bound], after: Sequence[Bound]) -> bool:
    return all(a.shape == b.shape and b.count <= a.count for a, b in zip(before, after, strict=True))


def _stacked(bound: Bound, count: float, exact: bool) -> Bound:
    shape = None if bound.shape is None else (int(count), *bound.shape)
    return Bound(bound.kind, shape, bound.count * count, varies=bound.varies or not exact)


_WITH_GRAPHS = {"If": _branches, "Loop": _loop, "Scan": _scan}
