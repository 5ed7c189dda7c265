"""Methods as frozen data, and what comes of carrying one out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

    def with_detail(self, detail: Mapping[str, float | int | str]) -> Change:
        """Return the same change with more numbers and words."""
        return self.model_copy(update={"detail": self.detail | dict(detail)})


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

    def done(self, layer: str, reason: str = "", /, **detail: float | int | str) -> None:
        """Record that a layer was changed, with the numbers and words of the report."""
        self.append(Change(method=self.method, layer=layer, status="done", reason=reason, detail=detail))

    def skip(self, layer: str, reason: str, /, **detail: float | int | str) -> None:
        """Record why a layer was left as it is."""
        self.append(Change(method=self.method, layer=layer, status="skipped", reason=reason, detail=detail))


class Outcome:
    """A handler's result: the model (the copy it was given, or what replaces it) and its changes."""

    __slots__ = ("changes", "model")

    def __init__(self, model: Model, changes: list[Change]) -> None:
        self.model = model
        self.changes = changes


class Only(Method):
    """A method on the layers that a pattern chooses; see `only`, which makes it.

    It takes the stage of the method that it wraps.

    Attributes:
        pattern: shell wildcards with `|` between several; a `!` in front of one leaves out what it matches.
        method: what is done to the layers.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    pattern: str = Field(pattern=r"\S")
    method: Method

    def __repr__(self) -> str:
        return f"only({self.pattern!r}, {self.method!r})"

    def covers(self, layer: str) -> bool:
        """Tell whether the pattern chooses the layer and the wrapped method covers it."""
        wanted = [part for part in self.parts if not part.startswith("!")] or ["*"]
        chosen = any(fnmatchcase(layer, part) for part in wanted)
        left_out = any(fnmatchcase(layer, part[1:]) for part in self.parts if part.startswith("!"))
        return chosen and not left_out and self.method.covers(layer)

    @property
    def parts(self) -> tuple[str, ...]:
        """The patterns between the `|`."""
        return tuple(part.strip() for part in self.pattern.split("|"))


def inner(method: Method) -> Method:
    """Return the method inside any number of `only` wrappers."""
    while isinstance(method, Only):
        method = method.method
    return method


def unmatched(method: Method, names: Collection[str]) -> str:
    """Return the first part of the patterns around a method that matches no name; empty where each does.

    >>> unmatched(Only(pattern="layer1.* | !head", method=Method()), ["layer1.conv", "fc"])
    '!head'
    """
    while isinstance(method, Only):
        for part in method.parts:
            if not any(fnmatchcase(name, part.removeprefix("!")) for name in names):
                return part
        method = method.method
    return ""


def with_fields(method: Method, **fields: Any) -> Method:
    """Return a method with other values of fields, within the `only` around it; those it lacks are left out.

    >>> import penjing as pj
    >>> with_fields(pj.only("!head", pj.Int8Static()), examples=8, rounds=3)
    only('!head', Int8Static(examples=8))
    """
    if isinstance(method, Only):
        return method.model_copy(update={"method": with_fields(method.method, **fields)})
    known = type(method).model_fields
    return method.model_copy(update={name: value for name, value in fields.items() if name in known})


def stage_of(method: Method) -> Stage:
    """Return the stage of a method, looking through `only`."""
    return inner(method).stage


def name_of(method: Method) -> str:
    """Return the name of a method's class, looking through `only`."""
    return type(inner(method)).__name__
