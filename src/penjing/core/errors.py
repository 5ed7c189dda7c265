"""The one exception that Penjing raises for what cannot be done."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the command line; stable from release to release."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    BUDGET_NOT_REACHED = 3
    BAD_INPUT = 4
    ENVIRONMENT = 5
    INTERRUPTED = 130


class Refused(Exception):
    """Something cannot be done: the rule that was broken, the value, the place, and what to do.

    Only this exception may turn into a failed trial; every other one is a defect and passes through.

    Attributes:
        rule: what must hold, as a clause with "must", "needs" or "cannot". A rule that begins with one of
            them has the place as its subject; any other is a sentence of its own.
        value: what was found instead.
        place: the field, file or layer where it was found.
        fix: what to do, as a sentence.
        code: the exit code of the command line.

    >>> print(Refused("must be less than 1", value=1.5, place="PruneChannels.ratio",
    ...               fix="use the share to remove, such as 0.3"))
    PruneChannels.ratio must be less than 1, got 1.5. Use the share to remove, such as 0.3.
    >>> print(Refused("the split must have examples", value=0, place="task.train", fix="give more data"))
    task.train: the split must have examples, got 0. Give more data.
    """

    def __init__(
        self,
        rule: str,
        *,
        value: object = None,
        place: str = "",
        fix: str,
        code: Exit = Exit.BAD_INPUT,
    ) -> None:
        self.rule = rule
        self.value = value
        self.place = place
        self.fix = fix
        self.code = code
        super().__init__(_sentence(rule, value, place, fix))

    def at(self, place: str) -> Refused:
        """Return the same refusal at another place, for one who knows better where the value came from."""
        return Refused(self.rule, value=self.value, place=place, fix=self.fix, code=self.code)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.rule, str(self.value), self.place, self.fix, int(self.code)))


_PREDICATES = ("must ", "needs ", "need ", "cannot ", "can ", "may ", "is ", "has ", "does ")


def _sentence(rule: str, value: object, place: str, fix: str) -> str:
    joint = " " if rule.startswith(_PREDICATES) else ": "
    text = f"{place}{joint}{rule}" if place else rule[:1].upper() + rule[1:]
    text += "" if value is None else f", got {value}"
    how = fix[:1].upper() + fix[1:]
    return f"{text}. {how}{'' if not how or how.endswith(('.', '?', '`')) else '.'}".rstrip()


def _rebuild(rule: str, value: str, place: str, fix: str, code: int) -> Refused:
    return Refused(rule, value=None if value == "None" else value, place=place, fix=fix, code=Exit(code))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the closest known names, for the `fix` of a refusal.

    >>> nearest("accurcy", ["accuracy", "f1"])
    "did you mean 'accuracy'? Known: accuracy, f1"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
