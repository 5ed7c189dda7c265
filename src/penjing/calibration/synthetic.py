"""Work without data: inputs made from what the model's BatchNorm layers remember, or of noise."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

import numpy as np

from penjing.core.context import Context
from penjing.core.data.split import Arrays, Split
from penjing.core.errors import Refused
from penjing.core.method import Method, name_of
from penjing.core.progress import Line
from penjing.core.value import Model

CalibrationData = Literal["train", "synthetic"]
"""Training inputs, or such as are made."""

TrainingData = Literal["train", "synthetic", "noise"]
"""Training inputs, such as are made, or noise of unit variance."""

MOST = 64
"""Inputs that are made together; for calibration no more."""
STEPS = 50
"""Of their optimization."""


def with_synthetic_calibration(model: Model, context: Context, examples: int) -> Context:
    """Return a context whose training inputs are made, `examples` of them but at most `MOST`.

    Of the task's own training data only shapes and types are used.

    Args:
        model: of PyTorch, with BatchNorm not folded yet; nothing in it changes.
        context: of the application.
        examples: at least 1; two are made at least.

    Raises:
        Refused: the model has no BatchNorm layers with running statistics, or an input that is no float.
    """
    from penjing.backends.torch.distill.synthesis import synthesize

    count = min(max(examples, 2), MOST)
    context.say(Line.step(f"making {count} inputs from BatchNorm statistics"))
    made = synthesize(model, context.task.train.example(), count, STEPS, context.seed)
    return _with(context, made)


def with_synthetic_training(model: Model, context: Context, examples: int, kind: TrainingData) -> Context:
    """Return a context whose training inputs are made; their targets are zeros that mean nothing.

    Of the task's own training data only shapes and types are used. Seconds go to `context.notes`.

    Args:
        model: of PyTorch, whose BatchNorm layers say what inputs look like; nothing in it changes.
        context: of the application; the inputs are its seed's.
        examples: to be made, at least 2.
        kind: `synthetic`: from BatchNorm statistics, in batches of `MOST`; `noise`: of unit variance.

    Raises:
        Refused: an input is no float, or for `synthetic` the model has no BatchNorm layers with running
            statistics.
    """
    from penjing.backends.torch.distill.synthesis import require_floats, synthesize

    start, example = time.perf_counter(), context.task.train.example()
    require_floats(example)
    context.say(Line.step(f"making {examples} inputs: {kind}"))
    parts = []
    for at in range(0, examples, MOST):
        # A last batch of one example has no moments; what is too much is cut.
        count = max(2, min(MOST, examples - at))
        seed = int(np.random.SeedSequence([context.seed, at]).generate_state(1)[0])
        if kind == "synthetic":
            parts.append(synthesize(model, example, count, STEPS, seed))
        else:
            generator = np.random.default_rng(seed)
            shapes = [(count, *x.shape[1:]) for x in example]
            parts.append(tuple(generator.standard_normal(shape, dtype=np.float32) for shape in shapes))
    made = tuple(np.concatenate(part)[:examples] for part in zip(*parts, strict=True))
    context.notes["made_inputs_s"] = context.notes.get("made_inputs_s", 0.0) + time.perf_counter() - start
    return _with(context, made)


def _with(context: Context, made: Arrays) -> Context:
    split = Split(made, np.zeros(len(made[0]), np.int64), "train")
    return replace(context, task=replace(context.task, train=split))


def synthetic_needs_torch(method: Method) -> Refused:
    """Return the refusal of a backend on which inputs cannot be made."""
    return Refused(
        "needs a PyTorch model with BatchNorm, through which inputs are made",
        value="a graph in which it is folded",
        place=f"{name_of(method)}.data",
        fix="give the PyTorch model, or write data='train'",
    )
