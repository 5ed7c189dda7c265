"""Whether an example's output depends on the others in its batch: asked of every model and every file.

BatchNorm without running statistics, a mean over the batch, sorting, scales taken from the whole batch, and
branches on the batch's size all make the quality in large batches another than that of the batch in which a
model is used. Such a model is judged in the batch of its target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import Arrays, Backend
from penjing.core.data.split import Split
from penjing.core.errors import Refused
from penjing.core.measurement import BatchDependence
from penjing.core.value import Model
from penjing.measurement.agreement import TOLERANCE, difference

Outputs = NDArray[Any]
Run = Callable[[Arrays, int], Outputs]
"""Runs all examples of some inputs in batches of a size."""

COMPARED = 32
"""Examples that are run on their own."""

NOISES = 3.0
"""How many times as much two runs of the same examples may differ."""


@dataclass(frozen=True)
class JudgedOutputs:
    """The outputs `[examples, ...]` of a model or a file.

    Attributes:
        outputs: in the batches that quality is judged in.
        usual: in batches of the task's size; the same array where they do not depend on the batch.
        batches: what was found of that.
    """

    outputs: Outputs
    usual: Outputs
    batches: BatchDependence


def judged_outputs(run: Run, inputs: Arrays, usual: int, batch: int) -> JudgedOutputs:
    """Return the outputs of every example as quality is to be judged by, and what was found of batches.

    Args:
        run: of a model in memory, or of a file in its runtime.
        inputs: arrays `[examples, ...]`.
        usual: batch size of the task, used where outputs do not depend on it.
        batch: of the target, used where they do.

    >>> shifted = lambda inputs, size: np.concatenate(
    ...     [x - x.mean(0) for x in np.split(inputs[0], range(size, len(inputs[0]), size))]
    ... )
    >>> judged_outputs(shifted, (np.eye(4),), usual=4, batch=1).batches.dependent
    True

    Raises:
        Refused: the model cannot run on the usual batch, or on the target's where that is needed.
    """
    outputs = run(inputs, usual)
    found = batch_dependence(run, inputs, outputs, usual, batch)
    if not found.dependent or batch == usual:
        return JudgedOutputs(outputs, outputs, found)
    return JudgedOutputs(run(inputs, batch), outputs, found)


def outputs_in_memory(backend: Backend, model: Model, split: Split, usual: int, batch: int) -> JudgedOutputs:
    """Return the outputs of a model in memory for a whole split, as `judged_outputs` does.

    >>> outputs_in_memory(backend, model, task.valid, task.batch_size, target.batch)  # doctest: +SKIP
    """

    def run(inputs: Arrays, size: int) -> Outputs:
        starts = range(0, len(inputs[0]), size)
        return np.concatenate([backend.run(model, tuple(x[i : i + size] for x in inputs)) for i in starts])

    return judged_outputs(run, split.arrays()[0], usual, batch)


def batch_dependence(run: Run, inputs: Arrays, outputs: Outputs, usual: int, batch: int) -> BatchDependence:
    """Compare outputs in the usual batches with those of examples on their own and in the target's batch.

    Args:
        outputs: of `run(inputs, usual)`; the others as for `judged_outputs`.

    Raises:
        Refused: the model cannot run on the target's batch.
    """
    chosen = np.unique(np.linspace(0, len(outputs) - 1, min(COMPARED, len(outputs))).astype(int))
    some = tuple(x[chosen] for x in inputs)
    try:
        alone = run(some, 1)
        apart = difference(outputs[chosen], alone)
        noise = difference(run(some, 1), alone) if apart > TOLERANCE else 0.0
    except Refused:
        if batch == 1:
            raise
        noise, apart = 0.0, 0.0  # it has no output for one example: only the target's batch is compared
    if batch not in (1, usual):
        first = tuple(x[: max(batch, COMPARED)] for x in inputs)
        apart = max(apart, difference(outputs[: len(first[0])], run(first, batch)))
    dependent = apart > TOLERANCE + NOISES * noise
    return BatchDependence(
        difference=apart, dependent=dependent, batch=batch if dependent else usual, n=len(chosen)
    )
