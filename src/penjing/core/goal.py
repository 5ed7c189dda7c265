"""A goal of training in people's words: a metric and the value that it has to come to."""

from __future__ import annotations

import math
import re

from penjing.core.errors import Exit, Refused
from penjing.core.value import Value

_TEXT = re.compile(
    r"^\s*([A-Za-z_][\w.-]*)\s*(>=|<=|≥|≤)\s*([+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(%?)\s*$"
)


class Goal(Value):
    """`metric >= value`, or `<=` where `at_least` is False.

    >>> parse_goal("accuracy >= 92%").met(0.93)
    True
    """

    metric: str
    at_least: bool
    value: float

    def met(self, value: float) -> bool:
        """Tell whether a value of the metric is as good as the goal."""
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.value:g}"


def parse_goal(text: str | Goal) -> Goal:
    """Read `accuracy >= 92%` or `rmse <= 0.3`; 92% is 0.92.

    Raises:
        Refused: no name, no comparison, no finite number, or a strict comparison.
    """
    if isinstance(text, Goal):
        return text
    match = _TEXT.match(text) if isinstance(text, str) else None
    if match is None or not math.isfinite(float(match[3])):
        raise Refused(
            "must read as metric, >= or <=, and a number",
            value=repr(text)[:80],
            place="goal",
            fix='write for example "accuracy >= 92%"',
            code=Exit.USAGE,
        )
    value = float(match[3]) / (100 if match[4] else 1)
    return Goal(metric=match[1], at_least=match[2] in (">=", "≥"), value=value)
