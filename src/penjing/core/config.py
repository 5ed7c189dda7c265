"""Turn pydantic's findings into our refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from penjing.core.errors import Exit, Refused, nearest

_SUBJECT = re.compile(r"^[A-Z]\w*(?: \w+)? should\b")
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def refusal(
    error: ValueError | TypeError, place: str, fields: type[BaseModel] | Mapping[str, FieldInfo | None]
) -> Refused:
    """Return the refusal for the first finding of a validation error; other errors as they are.

    Args:
        error: what pydantic found.
        place: what was validated, for example the name of a method.
        fields: the class that was validated, or its fields by name.
    """
    known = fields.model_fields if isinstance(fields, type) else fields
    if not isinstance(error, ValidationError):
        return Refused(
            "must be valid", value=error, place=place, fix=f"it takes {', '.join(known)}", code=Exit.USAGE
        )
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return Refused(
            f"cannot take a field {field!r}", place=place, fix=nearest(field, known), code=Exit.USAGE
        )
    where, given = f"{place}.{field}".rstrip("."), repr(first["input"])[:80]
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return Refused(
            "must be a known value",
            value=given,
            place=where,
            fix=nearest(first["input"], choices),
            code=Exit.USAGE,
        )
    rule, _, fix = first["msg"].removeprefix("Value error, ").partition(";")
    info = known.get(str(first["loc"][0])) if first["loc"] else None
    return Refused(
        _rule(rule),
        value=given if first["loc"] else None,
        place=where,
        fix=fix.strip() or _advice(info, where),
        code=Exit.USAGE,
    )


def _rule(message: str) -> str:
    """Return what pydantic says, with the field as its subject."""
    return "must be given" if message == "Field required" else _SUBJECT.sub("must", message)


def _advice(info: FieldInfo | None, place: str) -> str:
    """Return what a field takes, from its bounds and its default."""
    if info is None:
        return f"change the fields of {place} so that they agree"
    bounds = {name: getattr(part, name) for part in info.metadata for name in _BOUNDS if hasattr(part, name)}
    words = " and ".join(f"{_BOUNDS[name]} {value:g}" for name, value in bounds.items() if _number(value))
    default = "" if info.is_required() or info.default is None else f"the default is {info.default!r}"
    takes = f"give a number {words}" if words else f"give {_kind(info.annotation)}"
    return "; ".join(part for part in (takes, default) if part)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _kind(annotation: Any) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return names.get(annotation, f"a value of type {getattr(annotation, '__name__', annotation)}")
