"""A metric as a mean over examples: what it is of each one, found by asking it for one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.measurement.quality import metric_value

Floats = NDArray[np.float64]
Kind = Literal["mean", "root mean square", "geometric mean"]

AGREEMENT = 1e-5
"""Relative difference from the metric of all examples that sums in single precision can make."""


@dataclass(frozen=True)
class Average:
    """A mean of a function of the examples' values, taken back by its inverse.

    Attributes:
        forward: what is averaged, elementwise: the value, its square, its logarithm.
        back: from the mean to the metric; it rises.
    """

    forward: Callable[[Floats], Floats]
    back: Callable[[float], float]

    def of(self, values: Floats) -> float:
        """Return the metric of the examples with these values."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.back(float(np.mean(self.forward(values))))


AVERAGES: dict[Kind, Average] = {
    "mean": Average(lambda values: values, float),
    "root mean square": Average(np.square, lambda mean: math.sqrt(max(mean, 0.0))),
    "geometric mean": Average(np.log, math.exp),
}
"""Metrics that have a bound: mean absolute error and log loss, RMSE, perplexity are of these kinds."""

LOWEST: dict[Kind, float] = {"mean": -math.inf, "root mean square": 0.0, "geometric mean": 5e-324}
"""The least value of an example that an average can take."""


def example_values(task: Task, outputs: NDArray[Any], targets: NDArray[Any]) -> Floats | None:
    """Return the user's metric of every example alone, `[n]`; None where it has none for one example."""
    values = np.empty(len(targets))
    for i in range(len(targets)):
        try:
            values[i] = metric_value(task, outputs[i : i + 1], targets[i : i + 1])
        except Refused:
            return None
    return values


def kinds_of(task: Task, values: Floats, outputs: NDArray[Any], targets: NDArray[Any]) -> set[Kind]:
    """Return which averages of the examples' values are the metric, of all of them and of two halves."""
    found: set[Kind] = set(AVERAGES)
    order = np.random.default_rng(0).permutation(len(values))
    for index in (order, *np.array_split(order, 2)):
        if len(index) == 0:
            continue
        whole = metric_value(task, outputs[index], targets[index])
        size = max(abs(whole), float(np.abs(values[index]).mean()))
        for kind in list(found):
            part = values[index]
            fits = float(part.min()) >= LOWEST[kind]
            if not fits or abs(AVERAGES[kind].of(part) - whole) > AGREEMENT * size:
                found.discard(kind)
    return found
