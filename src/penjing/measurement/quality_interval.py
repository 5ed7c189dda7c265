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
from penjing.measurement.compare import numbered
from penjing.measurement.quality import metric_value, per_example, weighted_scores

_RESAMPLES = 200


def quality_of(
    task: Task, outputs: NDArray[Any], targets: NDArray[Any], groups: NDArray[Any] | None = None
) -> Estimate | NotMeasured:
    """Return the metric with a 95% interval: Wilson's for shares, else a bootstrap of examples, or of groups.

    Args:
        task: its metric and direction.
        outputs: one for each example.
        targets: of these examples.
        groups: `[n]`, equal for examples that depend on each other; None where all are independent.

    Raises:
        Refused: the metric cannot judge these outputs.
    """
    value, n = metric_value(task, outputs, targets), len(targets)
    hits, units = per_example(task, outputs, targets), numbered(groups)
    if hits is not None and units is None:
        interval = wilson(int(hits.sum()), n)
        low, high, how = interval.low, interval.high, "Wilson score interval"
    else:
        draws = _resampled(task, outputs, targets, hits, units)
        if len(draws) < _RESAMPLES // 2:
            return NotMeasured(
                reason=f"the metric is {value:g} but undefined on most resamples of these examples"
            )
        low, high = (float(x) for x in np.quantile(draws, [0.025, 0.975]))
        how = f"percentile bootstrap of {'examples' if units is None else 'groups'}"
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=n, how=how)


def _resampled(
    task: Task,
    outputs: NDArray[Any],
    targets: NDArray[Any],
    hits: NDArray[np.bool_] | None,
    units: NDArray[np.int64] | None,
) -> NDArray[np.float64]:
    """Return the metric on resamples of the examples, or of whole groups of them."""
    n, rng = len(targets), np.random.default_rng(0)
    drawn = n if units is None else int(units.max()) + 1
    counts = rng.multinomial(drawn, np.full(drawn, 1 / drawn), size=_RESAMPLES)
    counts = counts if units is None else counts[:, units]
    if hits is not None:
        return np.asarray(counts @ hits / counts.sum(axis=1))
    if isinstance(task.metric, str):
        return weighted_scores(task.metric, outputs.argmax(axis=1), targets, counts)
    draws = []
    for row in counts:
        index = np.repeat(np.arange(n), row)
        with suppress(Refused):
            draws.append(metric_value(task, outputs[index], targets[index]))
    return np.array(draws)
