"""How large a model is once its functions are expanded, counted before anything expands them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penjing.backends.onnx.graph.index import walk_nodes
from penjing.core.errors import Refused

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, NodeProto

LARGEST_GRAPH = 200_000
"""Nodes of a graph whose functions are expanded."""
DEEPEST_CALL = 64

Key = tuple[str, str, str]
"""Domain, name and overload of a function."""


def check_functions(proto: ModelProto, place: str) -> None:
    """Refuse recursion, deep chains of functions, and calls that multiply to a huge graph.

    A chain of 40 functions that call the next one twice is a small file and 2**40 nodes: whatever expands it
    (a checker, shape inference, a runtime) would never end.

    Raises:
        Refused: a function calls itself or is there twice, calls are nested too deep, or the expanded graph
            has more than `LARGEST_GRAPH` nodes.
    """
    functions = {_key_of(function): function for function in proto.functions}
    if len(functions) < len(proto.functions):
        raise Refused(
            "functions must have different names",
            value=f"{len(proto.functions)} functions of {len(functions)} names",
            place=place,
            fix="export the model again",
        )
    depth: dict[Key, int] = {}
    size: dict[Key, int] = {}
    for key in _callees_first(functions, place):
        calls = [_called(node) for node in walk_nodes(functions[key])]
        depth[key] = 1 + max((depth.get(call, 0) for call in calls), default=0)
        size[key] = sum(size.get(call, 1) for call in calls)
        if depth[key] > DEEPEST_CALL:
            raise Refused(
                f"functions must be nested at most {DEEPEST_CALL} deep",
                value="deeper",
                place=place,
                fix="inline the functions when exporting",
            )
        _check_size(size[key], f"{place}: function {key[1]!r}")
    _check_size(sum(size.get(_called(node), 1) for node in walk_nodes(proto.graph)), place)


def _key_of(function: FunctionProto) -> Key:
    return _plain(function.domain), function.name, getattr(function, "overload", "")


def _called(node: NodeProto) -> Key:
    return _plain(node.domain), node.op_type, getattr(node, "overload", "")


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _callees_first(functions: dict[Key, FunctionProto], place: str) -> list[Key]:
    """Return the functions in an order in which each comes behind those that it calls (Kahn 1962)."""
    callers: dict[Key, list[Key]] = {key: [] for key in functions}
    waits: dict[Key, int] = {}
    for key, function in functions.items():
        callees = {_called(node) for node in walk_nodes(function)} & functions.keys()
        waits[key] = len(callees)
        for callee in callees:
            callers[callee].append(key)
    order = [key for key, count in waits.items() if count == 0]
    for key in order:  # it grows while it is walked
        for caller in callers[key]:
            waits[caller] -= 1
            if waits[caller] == 0:
                order.append(caller)
    if len(order) < len(functions):
        raise Refused(
            "functions must not call themselves",
            value=f"{len(functions) - len(order)} that do",
            place=place,
            fix="inline the functions when exporting",
        )
    return order


def _check_size(nodes: int, place: str) -> None:
    if nodes > LARGEST_GRAPH:
        raise Refused(
            f"must have at most {LARGEST_GRAPH} nodes once functions are expanded",
            value=nodes if nodes < 10**9 else f"about 10**{len(str(nodes)) - 1}",
            place=place,
            fix="take the model from somebody you trust",
        )
