"""Which function carries a method out on a backend, and methods by their names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from penjing.core.config import refusal
from penjing.core.context import Context
from penjing.core.errors import Exit, Refused, nearest
from penjing.core.method import Method, Only, Outcome, inner
from penjing.core.names import METHODS
from penjing.core.value import Model

Handler = Callable[[Model, Any, Context], Outcome]

_HANDLERS: dict[tuple[type[Method], str], Handler] = {}


def handles(method: type[Method], backend: str = "any") -> Callable[[Handler], Handler]:
    """Register a function as the handler of a method on one backend (or on any)."""

    def register(function: Handler) -> Handler:
        key = (method, backend)
        assert key not in _HANDLERS, f"{method.__name__} already has a handler for {backend}"
        _HANDLERS[key] = function
        return function

    return register


def handler_for(method: Method, backend: str) -> Handler | None:
    """Return the handler of a method on a backend, or None where there is none."""
    load_methods()
    kind = type(inner(method))
    return _HANDLERS.get((kind, backend)) or _HANDLERS.get((kind, "any"))


def backends_of(method: type[Method]) -> tuple[str, ...]:
    """Return the names of the backends that have a handler for a method."""
    load_methods()
    return tuple(sorted(backend for kind, backend in _HANDLERS if kind is method))


def load_methods() -> dict[str, type[Method]]:
    """Import every method module and return the methods by name."""
    for module in METHODS.values():
        importlib.import_module(module)
    return {kind.__name__: kind for kind, _ in _HANDLERS}


def method_from_json(data: Any) -> Method:
    """Rebuild a method from what `method_to_json` wrote.

    Raises:
        Refused: the entry is no mapping with a known `method`, or a field is wrong.
    """
    if not isinstance(data, dict) or "method" not in data:
        raise Refused(
            "an entry of a plan must be a mapping with the key 'method'",
            value=repr(data)[:80],
            place="plan",
            fix="write it as {method: PruneChannels, ratio: 0.5}",
            code=Exit.USAGE,
        )
    fields = {str(k): v for k, v in data.items() if k not in ("method", "only")}
    name, known = str(data["method"]), load_methods()
    if name not in known:
        raise Refused(
            "the method must be known", value=name, place="plan", fix=nearest(name, known), code=Exit.USAGE
        )
    required = (field for field, info in known[name].model_fields.items() if info.is_required())
    missing = ", ".join(field for field in required if field not in fields)
    if missing:
        raise Refused(
            "the method needs all its fields",
            value=f"no {missing}",
            place=f"plan.{name}",
            fix="write it as {method: PruneChannels, ratio: 0.5}",
            code=Exit.USAGE,
        )
    patterns = data.get("only", [])
    try:
        method = known[name](**fields)
        for pattern in reversed([patterns] if isinstance(patterns, str) else patterns):
            method = Only(pattern=pattern, method=method)
    except TypeError as error:
        raise refusal(error, f"plan.{name}", known[name]) from error
    return method


def method_to_json(method: Method) -> dict[str, Any]:
    """Return a method as plain data: its name, its fields, and `only` where it is limited.

    `only` is a pattern, or a list of patterns that all have to match, outermost first.
    """
    patterns = []
    while isinstance(method, Only):
        patterns.append(method.pattern)
        method = method.method
    if patterns:
        return method_to_json(method) | {"only": patterns[0] if len(patterns) == 1 else patterns}
    return {"method": type(method).__name__} | method.model_dump(mode="json")
