"""Calibration without data: inputs made from what the model's BatchNorm layers remember."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from penjing.core.context import Context
from penjing.core.data import Split
from penjing.core.errors import Refused
from penjing.core.method import Method, Model, name_of

CalibrationData = Literal["train", "synthetic"]
"""Training inputs, or such as are made."""

MOST = 64
"""Inputs that are made, at most."""
STEPS = 50
"""Of their optimization."""


def without_data(model: Model, context: Context, examples: int) -> Context:
    """Return a context whose training inputs are made, `examples` of them but at most `MOST`.

    Of the task's own training data only shapes and types are used.

    Args:
        model: of PyTorch, with BatchNorm not folded yet; nothing in it changes.
        context: of the application.
        examples: at least 1; two are made at least.

    Raises:
        Refused: the model has no BatchNorm layers with running statistics, or an input that is no float.
    """
    from penjing.backends.torch.synthesis import synthesize

    count = min(max(examples, 2), MOST)
    context.say(f"making {count} inputs from BatchNorm statistics")
    made = synthesize(model, context.task.train.example(), count, STEPS, context.seed)
    split = Split(made, np.zeros(count, np.int64), "train")
    return replace(context, task=replace(context.task, train=split))


def no_gradients(method: Method) -> Refused:
    """Return the refusal of a backend on which inputs cannot be made."""
    return Refused(
        "inputs are made through a PyTorch model with BatchNorm", value="a graph in which it is folded",
        place=f"{name_of(method)}.data", fix="give the PyTorch model, or calibrate with data='train'",
    )  # fmt: skip
