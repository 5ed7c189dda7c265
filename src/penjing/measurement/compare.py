"""Which test fits the task's metric: exact for shares, betting where there is a range, else none."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.betting import Floats
from penjing.arrays.bootstrap import bootstrap
from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.measurement.class_averages import (
    Labels,
    PairedClasses,
    absent,
    recall_drop,
    summed,
    weighs_alike,
)
from penjing.measurement.example_values import AVERAGES, LOWEST, Kind, example_values, kinds_of
from penjing.measurement.paired import Paired, PairedAverage, PairedBootstrap, PairedProportions, PairedSum
from penjing.measurement.quality import checked_outputs, maximized, metric_value, per_example, weighted_scores

Array = NDArray[Any]
Units = NDArray[np.int64] | None

UNSTATED = "its range is not stated; set Task(metric_range=(lowest, highest)) of one example's value"
"""Why a metric of the user's has no bound by itself."""


def compare(
    task: Task, baseline: Array, candidate: Array, targets: Array, groups: Array | None = None, seed: int = 0
) -> Paired:
    """Compare two models' outputs on the same examples by the test that fits the task's metric.

    Args:
        task: its metric, direction and the range of its metric.
        baseline, candidate: outputs, one for each example.
        targets: of these examples.
        groups: `[n]`, equal for examples that depend on each other; None where all are independent.
        seed: of the bootstrap, for metrics without a bound.

    Raises:
        Refused: outputs or a metric that `metric_value` refuses.
    """
    baseline, candidate = checked_outputs(baseline, targets), checked_outputs(candidate, targets)
    values = [metric_value(task, outputs, targets) for outputs in (baseline, candidate)]
    units = numbered(groups)
    before, after = per_example(task, baseline, targets), per_example(task, candidate, targets)
    if isinstance(task.metric, str) and weighs_alike(task.metric):
        before, after = (outputs.argmax(axis=1) == targets for outputs in (baseline, candidate))
    if before is not None and after is not None:
        return _shares(before, after, units)
    if isinstance(task.metric, str):
        return _by_class(task, (baseline, candidate), targets, units, values, seed)
    found = _averaged(task, (baseline, candidate), targets, units)
    return (
        found if not isinstance(found, str) else _without(task, (baseline, candidate), targets, found, seed)
    )


def numbered(groups: Array | None) -> Units:
    """Return the number of each example's group; None where no two examples share one.

    >>> numbered(np.array(["b", "a", "b"])).tolist()
    [1, 0, 1]
    """
    if groups is None:
        return None
    names, units = np.unique(groups, return_inverse=True)
    return None if len(names) == len(units) else np.asarray(units, np.int64)


def _shares(before: Array, after: Array, units: Units) -> Paired:
    if units is None:
        return PairedProportions(int((before & ~after).sum()), int((after & ~before).sum()), len(before))
    return _sum(before.astype(float), after.astype(float), 1.0, units, "betting on changed predictions")


def _sum(before: Floats, after: Floats, width: float, units: Units, method: str) -> PairedSum:
    """Return the drop of a mean of values in a range of that width."""
    n = len(before)
    losses, largest = summed((before - after) / n, units), summed(np.full(n, width / n), units)
    return PairedSum(losses, largest, n, method if units is None else f"{method}, by group")


def _by_class(
    task: Task, outputs: tuple[Array, Array], targets: Array, units: Units, values: list[float], seed: int
) -> Paired:
    assert isinstance(task.metric, str)
    classes = outputs[0].shape[1]
    missing = absent(targets, classes)
    if missing:
        named = ", ".join(str(k) for k in missing[:5]) + (", ..." if len(missing) > 5 else "")
        why = f"no test example is of class {named}; give some of every class, or judge by accuracy"
        return _without(task, outputs, targets, why, seed)
    before, after = (x.argmax(axis=1) for x in outputs)
    labels = Labels(before, after, targets, classes, units)
    kind, average = task.metric.split("_")
    if kind == "recall":
        return recall_drop(labels)
    return PairedClasses(labels, kind, average == "weighted", values[0] - values[1])


def _averaged(task: Task, outputs: tuple[Array, Array], targets: Array, units: Units) -> Paired | str:
    """Return the comparison of a user's metric that is a mean over examples, or why it has no bound."""
    if task.metric_range is None:
        return UNSTATED
    found = [(x, example_values(task, x, targets)) for x in outputs]
    kinds: set[Kind] = set(AVERAGES)
    for x, values in found:
        kinds &= set() if values is None else kinds_of(task, values, x, targets)
    kind = next((kind for kind in AVERAGES if kind in kinds), None)
    if kind is None:
        return "it is no mean over examples; pass one as Task(metric=...), such as the mean absolute error"
    low, high = task.metric_range
    low = max(low, LOWEST[kind])
    if kind == "geometric mean" and task.metric_range[0] <= 0:
        return "a geometric mean has no bound at 0; state a lowest value above 0 in Task(metric_range=...)"
    clipped = [np.clip(cast(Floats, values), low, high) for _, values in found]
    changed = sum(int((x != values).sum()) for x, (_, values) in zip(clipped, found, strict=True))
    words = f"betting on paired differences of values in {low:g} to {high:g}"
    words += f" ({changed} values beyond it were clipped)" if changed else ""
    average, sign = AVERAGES[kind], 1.0 if maximized(task) else -1.0
    before, after = (sign * average.forward(x) for x in clipped)
    ends = (float(average.forward(np.array(low))), float(average.forward(np.array(high))))
    drop = _sum(before, after, ends[1] - ends[0], units, words)
    if kind == "mean":
        return drop
    above = (average.forward(clipped[0]) - ends[0]) / len(targets)
    return PairedAverage(drop, summed(above, units), ends, average, rises=sign < 0)


def _without(task: Task, outputs: tuple[Array, Array], targets: Array, why: str, seed: int) -> Paired:
    """Return the comparison by a metric without a bound."""
    sign = 1.0 if maximized(task) else -1.0

    def drop(weights: Floats) -> Floats:
        first, second = (_weighted(task, x, targets, weights) for x in outputs)
        return sign * (first - second)

    return PairedBootstrap(bootstrap(drop, len(targets), seed=seed), len(targets), why)


def _weighted(task: Task, outputs: Array, targets: Array, weights: Floats) -> Floats:
    if isinstance(task.metric, str):
        return weighted_scores(task.metric, outputs.argmax(axis=1), targets, weights)
    values = np.empty(len(weights))
    for i, row in enumerate(weights):
        index = np.repeat(np.arange(len(row)), row.astype(int))
        try:
            values[i] = metric_value(task, outputs[index], targets[index])
        except Refused:
            values[i] = np.nan
    return values
