"""Turn pydantic's findings into our refusals."""

from __future__ import annotations

import re

from pydantic import ValidationError

from penjing.core.errors import Exit, Refused, nearest


def refusal(error: ValueError | TypeError, place: str, known: tuple[str, ...]) -> Refused:
    """Return the refusal for the first finding of a validation error; other errors as they are."""
    if not isinstance(error, ValidationError):
        return Refused("a value is valid", value=error, place=place, code=Exit.USAGE)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return Refused(
            "the field is known", value=repr(field), place=place, fix=nearest(field, known), code=Exit.USAGE
        )
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return Refused(
            "the value is known",
            value=repr(first["input"])[:80],
            place=f"{place}.{field}",
            fix=nearest(first["input"], choices),
            code=Exit.USAGE,
        )
    rule = first["msg"].removeprefix("Value error, ").replace("Input should be", "the value is", 1)
    return Refused(
        rule,
        value=repr(first["input"])[:80],
        place=f"{place}.{field}".rstrip("."),
        fix="see the field's range in the documentation",
        code=Exit.USAGE,
    )
