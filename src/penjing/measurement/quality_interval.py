"""The value of a task's metric with an interval."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.statistics import wilson
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate, NotMeasured
from penjing.core.task import Task
from penjing.measurement.quality import metric_value, per_example, weighted_scores

_RESAMPLES = 200


def quality_of(task: Task, outputs: NDArray[Any], targets: NDArray[Any]) -> Estimate | NotMeasured:
    """Return the metric with a 95% interval: Wilson's for shares, else a bootstrap of examples.

    Raises:
        Refused: the metric cannot judge these outputs.
    """
    value, n = metric_value(task, outputs, targets), len(targets)
    hits = per_example(task, outputs, targets)
    if hits is not None:
        interval = wilson(int(hits.sum()), n)
        return Estimate(
            value=value,
            low=min(interval.low, value),
            high=max(interval.high, value),
            n=n,
            how="Wilson score interval",
        )
    draws = _resampled(task, outputs, targets)
    if len(draws) < _RESAMPLES // 2:
        return NotMeasured(
            reason=f"the metric is {value:g} but undefined on most resamples of these examples"
        )
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(
        value=value,
        low=min(float(low), value),
        high=max(float(high), value),
        n=n,
        how="percentile bootstrap of examples",
    )


def _resampled(task: Task, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    n, rng = len(targets), np.random.default_rng(0)
    if isinstance(task.metric, str):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
        return weighted_scores(task.metric, outputs.argmax(axis=1), targets, counts)
    draws = []
    for index in rng.integers(n, size=(_RESAMPLES, n)):
        with suppress(Refused):
            draws.append(metric_value(task, outputs[index], targets[index]))
    return np.array(draws)
