"""Models that do not answer the same twice: found by asking again, said, and claimed no better than that."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import Backend
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.core.verdict import Verdict
from penjing.measurement.agreement import difference
from penjing.measurement.quality import metric_name, metric_value

REPEATS = 5
"""Evaluations from which the spread of the metric is taken."""

ROUNDING = 1e-5
"""Relative difference that the order of additions alone can make."""


def outputs_of(backend: Backend, model: Model, task: Task, n: int, batch: int) -> NDArray[Any]:
    """Return the outputs for the first n examples of valid, in batches of the given size."""
    inputs = task.valid.arrays()[0]
    starts = range(0, min(n, len(task.valid)), batch)
    parts = [backend.run(model, tuple(x[i : i + batch] for x in inputs)) for i in starts]
    outputs: NDArray[Any] = np.concatenate(parts)[:n]
    return outputs


def twice(backend: Backend, model: Model, task: Task, n: int, batch: int) -> tuple[NDArray[Any], float]:
    """Return the outputs for the first n examples, and their relative difference from a second evaluation.

    A difference that rounding can make counts as 0.
    """
    first, second = (outputs_of(backend, model, task, n, batch) for _ in range(2))
    apart = difference(second, first)
    return first, apart if apart > ROUNDING else 0.0


def spread_of(backend: Backend, model: Model, task: Task, n: int) -> tuple[float, tuple[str, ...]]:
    """Return largest minus smallest metric of repeated evaluations of one model, and a note that says so."""
    targets = task.valid.arrays()[1][:n]
    values = [
        metric_value(task, outputs_of(backend, model, task, n, task.batch_size), targets)
        for _ in range(REPEATS)
    ]
    spread = max(values) - min(values)
    note = (
        f"the model is not deterministic: {REPEATS} evaluations on {len(targets)} examples gave "
        f"{metric_name(task)} {min(values):.4g} to {max(values):.4g}; no difference below {spread:.2g} is "
        "told apart from this noise"
    )
    return spread, (note,)


def within_noise(verdict: Verdict, spread: float, notes: tuple[str, ...]) -> Verdict:
    """Return a verdict that claims no drop below what the original itself varies by."""
    limit = verdict.limits.get("max_drop")
    limits = dict(verdict.limits)
    if limit is not None and limit.status == "reached" and spread >= limit.limit:
        reason = f"the metric of the original varies by {spread:.2g} from one evaluation to the next"
        limits["max_drop"] = limit.model_copy(update={"status": "inconclusive", "reason": reason})
    return Verdict.of(limits, verdict.certificate, (*verdict.notes, *notes))
