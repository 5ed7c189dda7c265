"""Budgets in people's words: parsed, checked and said back before anything starts."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from penjing.core.errors import Exit, Refused
from penjing.core.value import Value

CostUnit = Literal["ms", "bytes", "count"]

_UNITS: dict[str, dict[str, float]] = {
    "ms": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "bytes": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "s": {"s": 1, "sec": 1, "min": 60, "h": 3600},
    "count": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
}
_TEXT = re.compile(r"^\s*([+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([%a-zA-Zµ ]*?)\s*$")


class Limit(Value):
    """An upper bound: `relative` as a share of the baseline, else absolute in `unit`."""

    value: float = Field(gt=0)
    relative: bool
    unit: CostUnit

    def absolute(self, baseline: float) -> float:
        """Return the bound in its unit, given the baseline's value."""
        return self.value * baseline if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value * 100:g}% of the baseline" if self.relative else say(self.value, self.unit)


def say(value: float, unit: str) -> str:
    """Write a quantity for people.

    >>> say(2_500_000, "bytes"), say(0.25, "ms"), say(90, "s")
    ('2.5 MB', '0.25 ms', '1.5 min')
    """
    scaled = {
        "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")),
        "s": ((3600, "h"), (60, "min"), (0, "s")),
        "ms": ((1e3, "s"), (0, "ms")),
        "count": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (0, "")),
    }.get(unit, ((0, unit),))
    for factor, word in scaled:
        if abs(value) >= 0.9995 * factor:  # what rounds up to the next unit is written in it
            return f"{value / (factor or 1):.3g} {word}".strip()
    return f"{value:g} {unit}"


def parse_limit(text: str | float | Limit, unit: CostUnit, place: str) -> Limit:
    """Read `5ms`, `60%`, `10MB`, `2x faster`, or a bare number between 0 and 1 (a share of the baseline).

    Raises:
        Refused: not a number, not positive, a unit of another kind, a bare number above 1 (`50` is neither
            `50%` nor `50ms`), or a factor below 1 (`0.5x` can mean half or twice).

    >>> print(parse_limit("60%", "ms", "latency"), "|", parse_limit("2x faster", "ms", "latency"))
    60% of the baseline | 50% of the baseline
    """
    if isinstance(text, Limit):
        if text.unit != unit:
            raise _bad(f"the limit's unit must be {unit}", text.unit, place, f"give {place} in {unit}")
        return text
    number, word = _split(text, place)
    units = _UNITS[unit]
    example = {"ms": "5ms", "bytes": "10MB", "count": "40M"}[unit]
    if word == "%":
        return Limit(value=number / 100, relative=True, unit=unit)
    if word.replace(" ", "") in ("x", "xfaster", "xsmaller", "xless"):
        if number < 1:
            raise _bad("a factor must be at least 1", text, place, "write a share like 50%")
        return Limit(value=1 / number, relative=True, unit=unit)
    if word == "" and number <= 1:
        return Limit(value=number, relative=True, unit=unit)
    if word.lower() in units and (word or unit == "count"):
        return Limit(value=number * units[word.lower()], relative=False, unit=unit)
    raise _bad("must have a unit", text, place, f"write a share like 50% or an amount like {example}")


def parse_drop(text: str | float, place: str = "max_drop") -> float:
    """Read a quality drop: `1%` and `0.01` are both one point on a metric between 0 and 1."""
    number, word = _split(text, place, zero=True)
    if word == "%":
        number /= 100
    elif word:
        raise _bad("must be a share", text, place, "write 1% or 0.01")
    if not 0 < number < 1:
        raise _bad(
            "must be above 0 and below 100%", text, place, "write 1% or 0.01 for one point of the metric"
        )
    return number


def parse_time(text: str | float, place: str = "time") -> float:
    """Read a duration in seconds: `10min`, `90s`, `1.5h`."""
    number, word = _split(text, place)
    if word.lower() not in _UNITS["s"]:
        raise _bad("must have a unit", text, place, "write 90s, 10min or 1.5h")
    return number * _UNITS["s"][word.lower()]


def _split(text: Any, place: str, zero: bool = False) -> tuple[float, str]:
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise _bad("must be text or a number", repr(text), place, "write for example 60%")
    match = _TEXT.match(str(text))
    if match is None:
        raise _bad("must read as number and unit", repr(text), place, "write for example 60%, 5ms or 10MB")
    number = float(match[1])
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise _bad("must be a positive finite number", text, place, "write for example 60%")
    return number, match[2].strip()


def _bad(rule: str, value: object, place: str, fix: str) -> Refused:
    return Refused(rule, value=value, place=f"budget.{place}", fix=fix, code=Exit.USAGE)


COSTS: dict[str, CostUnit] = {"latency": "ms", "size": "bytes", "memory": "bytes", "operations": "count"}
"""The limits on cost, and the unit of each."""


class Budget(Value):
    """Limits on quality and cost, and what the search may spend. Every part is optional.

    Attributes:
        max_drop: largest loss of the task's metric, absolute (`1%` of accuracy 93.1% means down to 92.1%).
        latency, size, memory, operations: upper bounds, absolute (`5ms`, `10MB`) or relative (`60%`).
        time: seconds that the whole run may take, measurement and certification included.
        trials: largest number of plans tried.
        confidence: of the verdict, one-sided, between 0.5 and 1.

    >>> print(Budget(max_drop="1%", latency="60%", time="5min"))
    max_drop 1 points, latency 60% of the baseline, time 5 min; confidence 95%
    """

    max_drop: float | None = None
    latency: Limit | None = None
    size: Limit | None = None
    memory: Limit | None = None
    operations: Limit | None = None
    time: float | None = None
    trials: int | None = Field(default=None, ge=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValueError as error:
            raise _from_pydantic(error) from None

    @field_validator("max_drop", mode="before")
    @classmethod
    def _drop(cls, value: Any) -> float | None:
        return None if value is None else parse_drop(value)

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: Any) -> float | None:
        if isinstance(value, int | float):
            return _split(value, "time")[0]
        return None if value is None else parse_time(value)

    @model_validator(mode="before")
    @classmethod
    def _limits(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        parsed = dict(data)
        for name, unit in COSTS.items():
            given = data.get(name)
            if isinstance(given, dict):  # read back from JSON
                given = Limit(**given)
            if given is not None:
                parsed[name] = parse_limit(given, unit, name)
        return parsed

    @property
    def costs(self) -> dict[str, Limit]:
        """Return the limits on cost that were set, by name."""
        return {name: getattr(self, name) for name in COSTS if getattr(self, name) is not None}

    def __str__(self) -> str:
        parts = [] if self.max_drop is None else [f"max_drop {self.max_drop * 100:g} points"]
        parts += [f"{name} {limit}" for name, limit in self.costs.items()]
        parts += [] if self.time is None else [f"time {say(self.time, 's')}"]
        parts += [] if self.trials is None else [f"at most {self.trials} trials"]
        return f"{', '.join(parts) or 'no limits'}; confidence {self.confidence * 100:g}%"


LimitName = Literal["max_drop", "latency", "size", "memory", "operations", "time", "trials"]


def _from_pydantic(error: ValueError) -> Refused:
    from penjing.core.config import refusal

    return refusal(error, "budget", Budget)
