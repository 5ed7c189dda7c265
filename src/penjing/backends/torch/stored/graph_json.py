"""Operators and values of a captured graph as JSON, and the only names that are looked up when it is read."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from penjing.core.errors import Refused

FORMAT = 1
"""Version of `graph.json`."""

WRITE_AGAIN = "save the model again with this version of Penjing; the file is damaged or not one of its own"
"""What to do about a file that cannot be read."""

_PYTHON: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "neg",
            "pos",
            "getitem",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
            "or_",
        )
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in (
            "sym_float",
            "sym_int",
            "sym_ite",
            "sym_max",
            "sym_min",
            "sym_not",
        )
    },
}
"""Functions that compute sizes and take tuples apart."""

_PRIVATE = frozenset(
    {
        "_unsafe_view",
        "_softmax",
        "_log_softmax",
        "_to_copy",
        "_weight_norm",
        "_scaled_dot_product_attention_math",
    }
)
"""Operators of aten that begin with an underscore and may appear all the same."""

_HANDLES = ("Storage", "Stream", "Generator", "ScriptObject")
_ALIASES = {
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "__lshift__": "bitwise_left_shift",
    "__rshift__": "bitwise_right_shift",
}
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_LAYOUTS = {"strided": torch.strided}
_MEMORY = {
    name: getattr(torch, name)
    for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
_NUMBERS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_TABLES: dict[str, dict[str, Any]] = {
    "dtype": _DTYPES,
    "layout": _LAYOUTS,
    "memory_format": _MEMORY,
    "float": _NUMBERS,
}


def check_name(name: Any, what: str) -> str:
    """Return a dotted name of letters, digits, underscores and hyphens.

    Raises:
        Refused: anything else, or a part with two underscores in front.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or f".{name}".count(".__"):
        raise Refused(
            f"{what} must be a plain dotted name",
            value=repr(name)[:80],
            place="graph.json",
            fix=WRITE_AGAIN,
        )
    return name


def write_operator(target: Callable[..., Any]) -> str:
    """Return the name under which an operator is written.

    Raises:
        Refused: it is none that may be read back.
    """
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = str(target._schema.name).partition("::")
        overload = target._schema.overload_name or "default"
        written = f"{namespace}.{_ALIASES.get(name, name)}.{overload}"
    else:
        written = next((name for name, f in _PYTHON.items() if f is target), str(target))
    find_operator(written, fix="replace it in forward by operators of torch")
    return written


def find_operator(name: Any, fix: str = WRITE_AGAIN) -> Callable[..., Any]:
    """Look an operator up: an overload of the namespace aten, or one of a few functions of sizes.

    Operators that open files, or take storages, streams or generators, are not among them.

    Raises:
        Refused: any other name.

    >>> find_operator("aten.relu.default")
    <OpOverload(op='aten.relu', overload='default')>
    """
    if isinstance(name, str) and name in _PYTHON:
        return _PYTHON[name]
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) == 3 and parts[0] == "aten" and all(_WORD.fullmatch(part) for part in parts[1:]):
        packet_name, overload = parts[1:]
        private = packet_name.startswith("_") and packet_name not in _PRIVATE
        packet = None if private else getattr(torch.ops.aten, packet_name, None)
        if isinstance(packet, torch._ops.OpOverloadPacket) and overload in packet.overloads():
            found: Callable[..., Any] = getattr(packet, overload)
            if _is_harmless(found):
                return found
    raise Refused(
        "a stored graph must consist of known operators of aten",
        value=repr(name)[:80],
        place="graph.json",
        fix=fix,
    )


def _is_harmless(overload: torch._ops.OpOverload) -> bool:
    arguments = overload._schema.arguments
    if overload._schema.name in ("aten::set_", "aten::resize_", "aten::resize_as_"):
        return False
    return not any("file" in a.name or any(word in str(a.type) for word in _HANDLES) for a in arguments)


def check_keywords(target: Callable[..., Any], keywords: Any) -> None:
    """Refuse keyword arguments that an operator does not have."""
    schema = getattr(target, "_schema", None)
    known = {argument.name for argument in schema.arguments} if schema is not None else set()
    if not isinstance(keywords, dict) or set(keywords) - known:
        raise Refused(
            "an operator must have its own keyword arguments",
            value=repr(keywords)[:80],
            place="graph.json",
            fix=WRITE_AGAIN,
        )


def encode(value: Any, reference: Callable[[fx.Node], Any]) -> Any:
    """Return an argument as plain data; `reference` writes the nodes in it.

    Raises:
        Refused: a value of another kind.
    """
    if isinstance(value, fx.Node):
        return reference(value)
    if isinstance(value, torch.device):
        # A stored graph runs on the CPU.
        return {"device": "cpu"}
    for kind in ("dtype", "layout", "memory_format"):
        for name, found in _TABLES[kind].items():
            if value is found:
                return {kind: name}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [encode(item, reference) for item in value]
    raise Refused(
        "arguments of operators must be numbers, texts, types and lists",
        value=type(value).__name__,
        place="graph",
        fix="take what is none of them out of forward, or save the model with its class",
    )


def decode(data: Any, reference: Callable[[str, Any], Any]) -> Any:
    """Read an argument back; `reference` resolves what is neither number, text, type nor list.

    Raises:
        Refused: an unknown entry.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(item, reference) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        kind, value = next(iter(data.items()))
        if kind == "device" and value == "cpu":
            return torch.device("cpu")
        if kind not in _TABLES:
            return reference(kind, value)
        if isinstance(value, str) and value in _TABLES[kind]:
            return _TABLES[kind][value]
    raise Refused(
        "a stored argument must be of a known kind",
        value=repr(data)[:80],
        place="graph.json",
        fix=WRITE_AGAIN,
    )


def find_dtype(name: Any) -> torch.dtype:
    """Return a torch type by its name, `float32`.

    Raises:
        Refused: there is none of this name.
    """
    if not isinstance(name, str) or name not in _DTYPES:
        raise Refused(
            "a tensor must have a known type",
            value=repr(name)[:80],
            place="graph.json",
            fix=WRITE_AGAIN,
        )
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch type, without `torch.`."""
    return str(dtype).removeprefix("torch.")
