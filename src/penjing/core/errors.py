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
    """Something cannot be done, and here is the rule, the value, the place and the fix.

    Only this exception may turn into a failed trial; every other one is a defect and passes through.

    >>> print(Refused("ratio < 1", value=1.5, place="PruneChannels.ratio", fix="choose a ratio in [0, 1)"))
    `ratio < 1` does not hold: got 1.5 at PruneChannels.ratio. Fix: choose a ratio in [0, 1).
    """

    def __init__(
        self,
        rule: str,
        *,
        value: object = None,
        place: str = "",
        fix: str = "",
        code: Exit = Exit.BAD_INPUT,
    ) -> None:
        self.rule = rule
        self.value = value
        self.place = place
        self.fix = fix
        self.code = code
        got = "" if value is None else f": got {value}"
        where = f" at {place}" if place else ""
        how = f" Fix: {fix}." if fix else ""
        super().__init__(f"`{rule}` does not hold{got}{where}.{how}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.rule, str(self.value), self.place, self.fix, int(self.code)))


def _rebuild(rule: str, value: str, place: str, fix: str, code: int) -> Refused:
    return Refused(rule, value=None if value == "None" else value, place=place, fix=fix, code=Exit(code))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the closest known names, for the `fix` of a refusal.

    >>> nearest("accurcy", ["accuracy", "f1"])
    "did you mean 'accuracy'? known: accuracy, f1"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
