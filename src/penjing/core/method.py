"""Methods as frozen data, and what comes of carrying one out."""

from __future__ import annotations

from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from penjing.core.config import refusal
from penjing.core.value import Model, Value


class Stage(IntEnum):
    """The order in which methods are legal: what changes shapes comes before what changes numbers."""

    STRUCTURE = 1
    WEIGHTS = 2
    PRECISION = 3
    FORM = 4


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
            raise refusal(error, type(self).__name__, type(self)) from None

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


class Changes(list[Change]):
    """The changes of one method, in the order in which layers were looked at.

    >>> changes = Changes("PruneChannels")
    >>> changes.done("conv1", before=64, after=32)
    >>> changes.skip("fc", "the output of the model keeps its width")
    >>> [(change.layer, change.status) for change in changes]
    [('conv1', 'done'), ('fc', 'skipped')]
    """

    def __init__(self, method: Method | str) -> None:
        super().__init__()
        self.method = method if isinstance(method, str) else name_of(method)

    def done(self, layer: str, reason: str = "", **detail: float | int | str) -> None:
        """Record that a layer was changed, with the numbers and words of the report."""
        self.append(Change(method=self.method, layer=layer, status="done", reason=reason, detail=detail))

    def skip(self, layer: str, reason: str, **detail: float | int | str) -> None:
        """Record why a layer was left as it is."""
        self.append(Change(method=self.method, layer=layer, status="skipped", reason=reason, detail=detail))


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
