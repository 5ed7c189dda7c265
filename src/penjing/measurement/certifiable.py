"""What a test split could certify if no prediction changed: said before a search that could not end well."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from penjing.arrays.betting import Bets, stakes_below
from penjing.arrays.statistics import needed_examples, smallest_certifiable_drop
from penjing.core.task import Task
from penjing.measurement.compare import UNSTATED, numbered


class Certifiable(NamedTuple):
    """Limits on what can be certified.

    Attributes:
        smallest: drop that the test examples certify if nothing changes.
        needed: how many examples the asked drop takes at least; None where there are enough.
        no_bound: why no drop of the metric can be certified; empty where one can.
    """

    smallest: float
    needed: int | None
    no_bound: str = ""


def certifiable(task: Task, max_drop: float | None, confidence: float) -> Certifiable:
    """Return what the test split of a task can certify at the best.

    Args:
        task: prepared; its metric, the range of it, and the groups of test.
        max_drop: the asked limit, or None.
        confidence: one-sided, between 0.5 and 1.
    """
    if max_drop is None:
        return Certifiable(0.0, None)
    if callable(task.metric) and task.metric_range is None:
        return Certifiable(math.inf, None, UNSTATED)
    n, units = len(task.test), numbered(task.test.groups)
    if isinstance(task.metric, str) and units is None:
        needed = needed_examples(max_drop, 0.0, confidence)
        return Certifiable(smallest_certifiable_drop(n, 0.0, confidence), needed if needed > n else None)
    low, high = task.metric_range or (0.0, 1.0)
    sizes = np.ones(n) if units is None else np.bincount(units).astype(float)
    largest = sizes * (high - low) / n
    smallest = Bets(np.zeros(len(sizes)), stakes_below(largest)).upper(1 - confidence)
    return Certifiable(smallest, math.ceil(n * smallest / max_drop) if smallest > max_drop else None)
