"""Train a model by a method's strategy and report what that did."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Outcome
from penjing.core.task import Split
from penjing.train.hooks import NO_HOOKS, Hooks
from penjing.train.loop import fit
from penjing.train.objective import Objective, mean_loss, task_objective
from penjing.train.strategy import Strategy


def trained(
    model: Any,
    strategy: Strategy,
    context: Context,
    objective: Objective,
    split: Split | None = None,
    hooks: Hooks = NO_HOOKS,
    labelled: bool = True,
) -> Outcome:
    """Fit a torch module in place and return it with one change for the whole model.

    `split` replaces the task's training split; `hooks` are called while it trains. The task's own loss is
    measured before and after in evaluation mode on the same training examples, or the objective where they
    are not `labelled`. Seconds and events go to `context.notes`.

    Raises:
        Refused: what `fit` refuses, or a loss that is not finite after training.
    """
    task, name = context.task, type(strategy).__name__
    sized, given = strategy.sized(task), task.train if split is None else split
    size = sized.batch_size or task.batch_size
    judge, looked_at = (task_objective(task), task.train) if labelled else (objective, given)
    start = time.perf_counter()
    before = mean_loss(model, looked_at, judge, size, context.seed)
    done = fit(
        model,
        given,
        objective,
        sized,
        seed=context.seed,
        covers=context.covers,
        hooks=replace(hooks, say=lambda line: context.say(line.under(name))),
    )
    after = mean_loss(model, looked_at, judge, size, context.seed)
    if not math.isfinite(after):
        raise Refused(
            "the loss is finite after training",
            value=f"{after} after {done.steps} steps",
            place=name,
            fix=f"lower lr (now {strategy.rate:g})",
        )
    context.notes["training_s"] = context.notes.get("training_s", 0.0) + time.perf_counter() - start
    context.notes.setdefault("events", []).extend(f"{name}: {event}" for event in done.events)
    detail: dict[str, float | int | str] = {
        "loss_before": round(before, 6) if math.isfinite(before) else str(before),
        "loss_after": round(after, 6),
        "steps": done.steps,
        "seconds": round(done.seconds, 3),
        "data_seconds": round(done.data_seconds, 3),
        "samples_per_s": round(done.samples_per_s, 1),
    }
    return Outcome(model, [Change(method=name, layer="*", status="done", detail=detail)])
