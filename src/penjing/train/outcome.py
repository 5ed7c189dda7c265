"""Train a model by a method's strategy and report what that did."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Changes, Outcome, name_of
from penjing.core.task import Split
from penjing.train.hooks import NO_HOOKS, Hooks
from penjing.train.loop import FitResult, fit
from penjing.train.method import TrainingMethod
from penjing.train.objective import Objective, evaluate_loss, make_objective

if TYPE_CHECKING:
    from torch import nn


def train_by_method(
    model: nn.Module,
    method: TrainingMethod,
    context: Context,
    objective: Objective,
    split: Split | None = None,
    hooks: Hooks = NO_HOOKS,
    labelled: bool = True,
) -> Outcome:
    """Fit a torch module in place and return it with one change for the whole model.

    The task's own loss is measured before and after in evaluation mode on the same training examples, or the
    objective where they are not labelled. Seconds and events go to `context.notes`.

    Args:
        model: a torch module; trained in place.
        method: whose strategy says how.
        context: task, seed, layers that may be touched.
        objective: that is minimized.
        split: in the place of the task's training split.
        hooks: that are called while it trains; lines of progress go to `context.say`.
        labelled: whether the split's targets are the task's.

    Raises:
        Refused: what `fit` refuses, or a loss that is not finite after training.
    """
    task, name, strategy = context.task, name_of(method), method.strategy.with_batch_size(context.task)
    size, given = strategy.batch_size or task.batch_size, task.train if split is None else split
    judge, looked_at = (make_objective(task), task.train) if labelled else (objective, given)
    start = time.perf_counter()
    before = evaluate_loss(model, looked_at, judge, size, context.seed)
    done = fit(
        model,
        given,
        objective,
        strategy,
        seed=context.seed,
        covers=context.covers,
        hooks=replace(hooks, log=lambda line: context.say(line.under(name))),
    )
    after = evaluate_loss(model, looked_at, judge, size, context.seed)
    if not math.isfinite(after):
        raise Refused(
            "the loss must be finite after training",
            value=f"{after} after {done.steps} steps",
            place=name,
            fix=f"lower lr (now {strategy.peak_lr:g})",
        )
    note_training(context, name, time.perf_counter() - start, done)
    changes = Changes(method)
    changes.done(
        "*",
        loss_before=round(before, 6) if math.isfinite(before) else str(before),
        loss_after=round(after, 6),
        steps=done.steps,
        seconds=round(done.seconds, 3),
        data_seconds=round(done.data_seconds, 3),
        samples_per_s=round(done.samples_per_s, 1),
    )
    return Outcome(model, changes)


def note_training(context: Context, name: str, seconds: float, done: FitResult) -> None:
    """Add the seconds and events of a training to the notes of a context."""
    notes = context.notes
    notes["training_s"] = notes.get("training_s", 0.0) + seconds
    notes.setdefault("events", []).extend(f"{name}: {event}" for event in done.events)
