"""Train a student that is given, towards one teacher or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from penjing.core.apply import Applied, apply
from penjing.core.backend import Backend, enter
from penjing.core.context import Context
from penjing.core.errors import Exit, Refused
from penjing.core.method import Method, inner
from penjing.core.progress import Say, silent
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.distillation.logits import Distill
from penjing.train.method import DistillationMethod


def distill(
    student: Model,
    teacher: Model | Sequence[Model],
    task: Task,
    method: Method | None = None,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    say: Say = silent,
) -> Applied:
    """Return a copy of the student, trained towards a teacher; nothing that is given is changed.

    `pj.apply(model, Distill(), task)` is the same with the model before the plan as its own teacher.

    Args:
        student: a torch module of any architecture; its outputs have the shape of the teacher's.
        teacher: a torch module, or a list of them, whose outputs count together (softened distributions
            are averaged; for `loss="mse"` outputs are).
        task: data, loss and metric; only `task.train` is used, and labels as far as the method needs them.
        method: `Distill` (the default) or another that has a teacher, or one of them in `only`.
        weights: of the teachers, above 0; equal by default.
        seed: of the order of examples.
        say: called with a line of progress once an epoch.

    Raises:
        Refused: a method without a teacher, no teacher, wrong weights, a teacher of another framework or one
            that does not run on the data, teachers whose outputs differ in shape, or what the method refuses.

    >>> import numpy as np, torch
    >>> x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    >>> task = Task(train=(x, (x[:, 0] > 0).astype(int)))
    >>> teacher, student = (torch.nn.Linear(4, 2) for _ in range(2))
    >>> distilled = distill(student, teacher, task, Distill(epochs=1))
    >>> distilled.changes[0].done
    True
    """
    method = Distill() if method is None else method
    if not isinstance(method, Method) or not isinstance(inner(method), DistillationMethod):
        raise Refused(
            "must be a method with a teacher",
            value=repr(method)[:80],
            place="distill.method",
            code=Exit.USAGE,
            fix="pass Distill or another method whose name begins so; apply takes all",
        )
    teachers = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    shares = _shares(teachers, weights)
    task = task.prepare()
    backend, _, entered = enter(student, task)
    original = _ensemble(backend, teachers, shares, task)
    context = Context(task=entered, backend=backend, original=original, seed=seed, say=say)
    return apply(student, method, task, context=context)


def _shares(teachers: Sequence[Model], weights: Sequence[float] | None) -> list[float]:
    if not teachers:
        raise Refused(
            "needs at least one model",
            value="an empty list",
            place="distill.teacher",
            fix="give a model, or several in a list",
            code=Exit.USAGE,
        )
    shares = [1.0] * len(teachers) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(teachers) or not all(math.isfinite(share) and share > 0 for share in shares):
        raise Refused(
            "must be one number above 0 for each teacher",
            value=f"{shares} for {len(teachers)}",
            place="distill.weights",
            fix="leave them out for equal weights",
            code=Exit.USAGE,
        )
    return shares


def _ensemble(backend: Backend, teachers: Sequence[Model], shares: list[float], task: Task) -> Any:
    """Return the one model, or the ensemble, that teaches, checked on an example."""
    example, found, shapes = task.valid.example(), [], []
    for number, model in enumerate(teachers):
        its, selected, _ = enter(model, task)
        if its.name != backend.name:
            raise Refused(
                "must be of the student's framework",
                place=f"distill.teacher {number}",
                value=f"{its.name} beside {backend.name}",
                fix="export the student after it was taught",
            )
        its.check(selected, example)
        found.append(selected)
        shapes.append(its.run(selected, example).shape[1:])
    if len(set(shapes)) > 1:
        raise Refused(
            "must give outputs of one shape",
            place="distill.teacher",
            value=", ".join(map(str, shapes)),
            fix="leave those out that differ",
        )
    if len(found) == 1:
        return found[0]
    from penjing.backends.torch.distill.ensemble import Ensemble

    return Ensemble(found, shares)
