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
from penjing.train.teacher import Taught


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
    """
    method = Distill() if method is None else method
    if not isinstance(method, Method) or not isinstance(inner(method), Taught):
        raise Refused(
            "the method has a teacher",
            value=repr(method)[:80],
            place="distill",
            code=Exit.USAGE,
            fix="pass Distill or another method whose name begins so; apply takes all",
        )
    teachers = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    shares = _shares(teachers, weights)
    task = task.prepare()
    backend, _, entered = enter(student, task)
    original = _together(backend, teachers, shares, task)
    context = Context(task=entered, backend=backend, original=original, seed=seed, say=say)
    return apply(student, method, task, context=context)


def _shares(teachers: Sequence[Model], weights: Sequence[float] | None) -> list[float]:
    if not teachers:
        raise Refused("there is a teacher", value="an empty list", place="distill", code=Exit.USAGE)
    shares = [1.0] * len(teachers) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(teachers) or not all(math.isfinite(share) and share > 0 for share in shares):
        raise Refused(
            "each teacher has a weight above 0",
            value=f"{shares} for {len(teachers)}",
            place="distill.weights",
            code=Exit.USAGE,
        )
    return shares


def _together(backend: Backend, teachers: Sequence[Model], shares: list[float], task: Task) -> Any:
    """Return one model that teaches, checked on an example."""
    example, found, shapes = task.valid.example(), [], []
    for number, model in enumerate(teachers):
        its, selected, _ = enter(model, task)
        if its.name != backend.name:
            raise Refused(
                "student and teachers are of one framework",
                place=f"teacher {number}",
                value=f"{its.name} beside {backend.name}",
            )
        its.check(selected, example)
        found.append(selected)
        shapes.append(its.run(selected, example).shape[1:])
    if len(set(shapes)) > 1:
        raise Refused(
            "teachers give outputs of one shape",
            place="distill",
            value=", ".join(map(str, shapes)),
            fix="leave those out that differ",
        )
    if len(found) == 1:
        return found[0]
    from penjing.backends.torch.distill.committee import Committee

    return Committee(found, shares)
