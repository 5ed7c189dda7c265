"""What the verbs that train share: a strategy from the task file and from options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from penjing.cli.taskfile import TaskFile
    from penjing.core.progress import Line
    from penjing.train.strategy import Strategy

Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of the strategy, as epochs=10 or optimizer=adamw; several times."),
]


def read_strategy(file: TaskFile, settings: list[str] | None) -> Strategy:
    """Return the strategy of a task file (`strategy`, a value or a function), with what was set on top.

    Raises:
        Refused: no strategy by that name, or a field that is unknown or out of range.
    """
    from penjing.core.errors import Exit, Refused
    from penjing.train.strategy import Strategy

    own = getattr(file.module, "strategy", None)
    own = own() if callable(own) else own
    if own is not None and not isinstance(own, Strategy):
        raise Refused(
            "must be a penjing.Strategy, or a function that returns one",
            value=type(own).__name__,
            place=f"strategy in {file.path}",
            fix="write strategy = pj.Strategy(epochs=10)",
            code=Exit.USAGE,
        )
    fields: dict[str, Any] = {} if own is None else own.model_dump()
    for setting in settings or ():
        name, sign, text = setting.partition("=")
        if not sign or not name.strip():
            raise Refused(
                "must have the form field=value",
                value=setting,
                place="--set",
                fix="write --set epochs=10",
                code=Exit.USAGE,
            )
        fields[name.strip()] = _value(text.strip())
    return Strategy(**fields)


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return None if text == "None" else text


def say(line: Line) -> None:
    """Write a line of progress to stderr."""
    from penjing.report.words import clean

    typer.echo(clean(line), err=True)
