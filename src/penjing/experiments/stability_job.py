"""One run of a training procedure in a process of its own: train, predict, and bear corruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.corruptions import corrupt, fitting
from penjing.core.backend import backend_for
from penjing.core.errors import Refused
from penjing.core.progress import Say
from penjing.core.task import Split, Task
from penjing.core.value import Model, Value
from penjing.experiments.procedure import TrainingProcedure
from penjing.measurement.quality import is_classification, metric_value, per_example

BATCH = 256
RESAMPLES = 20
"""Of the test examples, for the standard error of a metric that is no mean of right and wrong."""


class SeedResult(Value):
    """What one seed came to on one data set, on its test split.

    Attributes:
        quality: the metric.
        corrupted: by corruption, the mean of the metric over severities.
        error: standard error of a quality that is no mean of right and wrong, from the choice of test
            examples; else None.
    """

    quality: float
    corrupted: dict[str, float]
    error: float | None


def run_once(
    shared: tuple[TrainingProcedure, dict[str, Task]],
    say: Say,
    name: str,
    seed: int,
    fresh_splits: bool,
    severities: tuple[int, ...],
    predictions: Path,
) -> dict[str, Any]:
    """Train with one seed on one data set and judge on its test split.

    Args:
        shared: the procedure, and the tasks by name.
        name: of the task.
        seed: of weights, order and, with `fresh_splits`, of the division of train and valid.
        severities: of the corruptions; empty: none.
        predictions: `.npz` file for the predicted `classes` and which of them are `right`, where there are.

    Returns:
        The JSON of a `SeedResult`, which goes from one process to another.

    Raises:
        Refused: what training refuses.
    """
    procedure, tasks = shared
    task = tasks[name]
    if fresh_splits:
        task = redivide(task, seed)
    model = procedure.train(task, seed, say)
    inputs, targets = task.test.arrays()
    outputs = _outputs(model, task, inputs)
    right = per_example(task, outputs, targets)
    kept: dict[str, Any] = {} if right is None else {"right": right}
    if is_classification(outputs, targets):
        kept["classes"] = outputs.argmax(1)
    np.savez(predictions, **kept)
    corrupted = {}
    for kind in fitting(inputs[0]) if severities else ():
        values = [
            metric_value(
                task, _outputs(model, task, (corrupt(inputs[0], kind, s, seed), *inputs[1:])), targets
            )
            for s in severities
        ]
        corrupted[kind] = float(np.mean(values))
    quality = metric_value(task, outputs, targets)
    error = _standard_error(task, outputs, targets) if right is None else None
    return SeedResult(quality=quality, corrupted=corrupted, error=error).model_dump(mode="json")


def redivide(task: Task, seed: int) -> Task:
    """Return a task whose train and valid are drawn anew from both together; test stays.

    Raises:
        Refused: training data that are read anew on every pass.
    """
    from dataclasses import replace

    train, valid = task.train, task.valid
    if getattr(train, "inputs", None) is None:
        raise Refused(
            "splits='fresh' needs training data in arrays",
            value="data that are read live",
            place="task.train",
            fix='pass arrays, or splits="fixed"',
        )
    inputs = tuple(np.concatenate(pair) for pair in zip(train.inputs, valid.inputs, strict=True))
    targets = np.concatenate([train.targets, valid.targets])
    order = np.random.default_rng(seed).permutation(len(targets))
    whole = Split(inputs, targets, "train")
    return replace(
        task,
        train=whole.take(order[len(valid) :], "train"),
        valid=whole.take(order[: len(valid)], "valid"),
    )


def _standard_error(task: Task, outputs: NDArray[Any], targets: NDArray[Any]) -> float | None:
    """Return the metric's bootstrap standard error (Efron 1979); None where a resample has no value."""
    rng, n = np.random.default_rng(0), len(targets)
    drawn = [rng.integers(0, n, n) for _ in range(RESAMPLES)]
    try:
        return float(np.std([metric_value(task, outputs[rows], targets[rows]) for rows in drawn], ddof=1))
    except Refused:
        return None


def _outputs(model: Model, task: Task, inputs: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    backend = backend_for(model)
    judged = backend.select(model, task.output)
    n = len(inputs[0])
    parts = [backend.run(judged, tuple(x[i : i + BATCH] for x in inputs)) for i in range(0, n, BATCH)]
    outputs: NDArray[Any] = np.concatenate(parts)
    return outputs
