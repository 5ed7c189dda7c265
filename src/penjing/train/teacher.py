"""The original model as a teacher: the objective of distillation from logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from penjing.arrays.distillation import EPSILON
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.train.numerics import Numerics, numerics_for
from penjing.train.objective import Objective, Tensors, pick, task_objective, tensors_of

Recall = Callable[[Tensors, Any], tuple[Any, Any]]

CACHE_BYTES = 1 << 30
"""Largest table of teacher's logits to keep in memory."""


@dataclass(frozen=True)
class Teaching:
    """How the original teaches.

    Attributes:
        temperature: softens both distributions, above 0.
        alpha: share of the teacher's loss in [0, 1]; the rest is the task's own.
        standardize: whether logits are standardized row by row first.
        precision: in which the teacher computes.
    """

    temperature: float = 2.0
    alpha: float = 0.9
    standardize: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "float32"


@contextmanager
def taught(context: Context, how: Teaching) -> Iterator[tuple[Split, Objective]]:
    """Yield what to train on, and the objective that draws a model towards `context.original`.

    The loss is `alpha` of Hinton's (2015), with logits standardized (Sun et al., CVPR 2024) where asked,
    and the rest of the task's own. The original never changes.

    Raises:
        Refused: when called, outputs that are no rows of at least two logits.
    """
    teacher = context.backend.copy(context.original).requires_grad_(False).eval()
    numerics = numerics_for(teacher, how.precision)
    with numerics.applied(teacher):
        yield _objective(how, context.task, teacher, numerics)


def _objective(how: Teaching, task: Task, teacher: Any, numerics: Numerics) -> tuple[Split, Objective]:
    hard = task_objective(task)
    split, recall = _recalling(task.train, _Teacher(teacher, task, numerics))

    def objective(outputs: Any, inputs: Tensors, targets: Any) -> Any:
        labels, logits = recall(inputs, targets)
        student = _logits(pick(outputs, task.output))
        loss = how.alpha * hinton_loss(student, logits, how.temperature, how.standardize)
        return loss if how.alpha == 1 else loss + (1 - how.alpha) * hard(outputs, inputs, labels)

    return split, objective


def _recalling(split: Split, teach: _Teacher) -> tuple[Split, Recall]:
    """Return a split and a function of its batches that gives the labels and the teacher's logits.

    Examples that come from arrays never change: the targets of the split returned are then row numbers,
    and the teacher sees every example once. Live data may be augmented: the teacher sees every batch.
    """
    if getattr(split, "inputs", None) is None:
        return split, lambda inputs, targets: (targets, teach(inputs))
    return Split(split.inputs, np.arange(len(split)), split.name), _Memory(split, teach)


def hinton_loss(student: Any, teacher: Any, temperature: float, standardized: bool) -> Any:
    """Return Hinton's loss on torch tensors `[n, classes]`, as `penjing.arrays.distillation` defines it."""
    from torch.nn.functional import kl_div, log_softmax

    if standardized:
        student, teacher = _standardize(student), _standardize(teacher)
    log_q, log_p = (log_softmax(z / temperature, dim=-1) for z in (student, teacher))
    return temperature**2 * kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _standardize(logits: Any) -> Any:
    variance = logits.var(dim=-1, keepdim=True, correction=0)
    return (logits - logits.mean(dim=-1, keepdim=True)) / (variance + EPSILON).sqrt()


class _Teacher:
    def __init__(self, module: Any, task: Task, numerics: Numerics) -> None:
        self._module, self._output, self._numerics = module, task.output, numerics

    def __call__(self, inputs: Tensors) -> Any:
        import torch

        with torch.no_grad(), self._numerics.autocast():
            return _logits(pick(self._module(*self._numerics.lay_out(inputs)), self._output))


class _Memory:
    """The teacher's logits of every row, each computed when it is first asked for."""

    def __init__(self, split: Split, teach: _Teacher) -> None:
        self._targets, self._teach = split.targets, teach
        self._labels: Any = None
        self._logits: Any = None

    def __call__(self, inputs: Tensors, rows: Any) -> tuple[Any, Any]:
        if self._labels is None:
            self._labels = tensors_of((self._targets,))[0].to(inputs[0].device)
        if self._logits is None:
            logits = self._teach(inputs)
            if logits[0].nbytes * len(self._labels) > CACHE_BYTES:
                return self._labels[rows], logits
            self._logits = logits.new_full((len(self._labels), logits.shape[1]), float("nan"))
            self._logits[rows] = logits
        new = self._logits[rows, 0].isnan()
        if bool(new.any()):
            self._logits[rows[new]] = self._teach(tuple(x[new] for x in inputs))
        return self._labels[rows], self._logits[rows]


def _logits(outputs: Any) -> Any:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise Refused("the model gives one row of at least two logits for each example",
                      value=f"output shape {tuple(outputs.shape)}", place="teacher",
                      fix="train without a teacher, as FineTune does")  # fmt: skip
    return outputs
