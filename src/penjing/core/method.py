"""Methods as frozen data, handlers as functions, and the one registry that joins them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penjing.core.config import refusal
from penjing.core.errors import Exit, Refused, nearest

if TYPE_CHECKING:
    from penjing.core.context import Context

Model = Any
"""A model of any framework; the backend that fits is found from its class."""


class Stage(IntEnum):
    """The order in which methods are legal: what changes shapes comes before what changes numbers."""

    STRUCTURE = 1
    WEIGHTS = 2
    PRECISION = 3
    FORM = 4


class Value(BaseModel):
    """Base of every saved value: frozen, compared by content, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((k, v) for k, v in super().__repr_args__() if k is None or v != self._default(k))

    def _default(self, field: str) -> object:
        info = type(self).model_fields.get(field)
        return object() if info is None or info.is_required() else info.get_default(call_default_factory=True)


class Method(Value):
    """One thing that can be done to a model: a frozen, validated, hashable configuration.

    Raises:
        Refused: a field is unknown, missing or out of its range.
    """

    stage: ClassVar[Stage]

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise refusal(error, type(self).__name__, tuple(type(self).model_fields)) from None

    def __str__(self) -> str:
        return repr(self)

    def covers(self, layer: str) -> bool:
        """Tell whether this method may touch the layer of this name."""
        return True


class Change(Value):
    """What a handler did to one layer, or why it did not.

    `detail` holds numbers and words for the report: channels before and after, scale, error.
    """

    method: str
    layer: str
    status: Literal["done", "skipped"]
    reason: str = ""
    detail: dict[str, float | int | str] = Field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the layer was changed."""
        return self.status == "done"


class Outcome:
    """A handler's result: the model (the copy it was given, or what replaces it) and its changes."""

    __slots__ = ("changes", "model")

    def __init__(self, model: Model, changes: list[Change]) -> None:
        self.model = model
        self.changes = changes


class Only(Method):
    """A method on the layers whose names match a pattern (shell wildcards, `|` between several).

    Made by `only`; it takes the stage of the method it wraps.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    pattern: str = Field(pattern=r"\S")
    method: Method

    def __repr__(self) -> str:
        return f"only({self.pattern!r}, {self.method!r})"

    def covers(self, layer: str) -> bool:
        """Tell whether the pattern matches the layer and the wrapped method covers it."""
        matches = any(fnmatchcase(layer, part.strip()) for part in self.pattern.split("|"))
        return matches and self.method.covers(layer)


Handler = Callable[[Model, Any, "Context"], Outcome]

_HANDLERS: dict[tuple[type[Method], str], Handler] = {}

METHOD_MODULES = (
    "penjing.prune.blocks",
    "penjing.prune.channels",
    "penjing.prune.transformer",
    "penjing.prune.magnitude",
    "penjing.prune.gradual",
    "penjing.prune.second_order",
    "penjing.prune.kfac",
    "penjing.prune.wanda",
    "penjing.prune.sparsegpt",
    "penjing.prune.obc",
    "penjing.prune.alps",
    "penjing.repair.batchnorm",
    "penjing.repair.bias",
    "penjing.repair.least_squares",
    "penjing.repair.match_statistics",
    "penjing.train.finetune",
    "penjing.distillation.logits",
    "penjing.distillation.features",
    "penjing.distillation.relations",
    "penjing.distillation.on_policy",
    "penjing.distillation.blocks",
    "penjing.quantize.int8_static",
    "penjing.quantize.int8_dynamic",
    "penjing.quantize.nearest",
    "penjing.quantize.reconstruct",
    "penjing.quantize.gptq",
    "penjing.quantize.awq",
    "penjing.quantize.autoround",
    "penjing.quantize.equalize",
    "penjing.quantize.smooth",
    "penjing.quantize.train",
    "penjing.quantize.weight_only",
    "penjing.quantize.embeddings",
)
"""Where methods live; importing them imports no framework."""


def handles(method: type[Method], backend: str = "any") -> Callable[[Handler], Handler]:
    """Register a function as the handler of a method on one backend (or on any)."""

    def register(function: Handler) -> Handler:
        key = (method, backend)
        assert key not in _HANDLERS, f"{method.__name__} already has a handler for {backend}"
        _HANDLERS[key] = function
        return function

    return register


def inner(method: Method) -> Method:
    """Return the method inside any number of `only` wrappers."""
    while isinstance(method, Only):
        method = method.method
    return method


def stage_of(method: Method) -> Stage:
    """Return the stage of a method, looking through `only`."""
    return inner(method).stage


def name_of(method: Method) -> str:
    """Return the name of a method's class, looking through `only`."""
    return type(inner(method)).__name__


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
    for module in METHOD_MODULES:
        importlib.import_module(module)
    return {kind.__name__: kind for kind, _ in _HANDLERS}


def method_from_json(data: Any) -> Method:
    """Rebuild a method from what `method_to_json` wrote.

    Raises:
        Refused: the entry is no mapping with a known `method`, or a field is wrong.
    """
    if not isinstance(data, dict) or "method" not in data:
        raise Refused(
            "a plan's entry is a mapping with the key 'method'",
            value=repr(data)[:80],
            place="plan",
            fix="write it as {method: PruneChannels, ratio: 0.5}",
            code=Exit.USAGE,
        )
    fields = {str(k): v for k, v in data.items() if k not in ("method", "only")}
    name, known = str(data["method"]), load_methods()
    if name not in known:
        raise Refused(
            "the method is known", value=name, place="plan", fix=nearest(name, known), code=Exit.USAGE
        )
    required = (field for field, info in known[name].model_fields.items() if info.is_required())
    missing = ", ".join(field for field in required if field not in fields)
    if missing:
        raise Refused(
            "the method has its fields",
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
        raise refusal(error, f"plan.{name}", tuple(known[name].model_fields)) from error
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
