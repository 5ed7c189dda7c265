"""The range test of the learning rate as a user calls it, with its page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from penjing.core.backend import backend_for
from penjing.core.errors import Exit, Refused
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.experiments.fit import refuse_framework
from penjing.report.training import write_range_report
from penjing.train.objective import make_objective
from penjing.train.range_test import RangeTest, run_range_test
from penjing.train.strategy import Strategy

MOST, LEAST = 10_000, 10


def range_test(
    model: Model,
    task: Task,
    strategy: Strategy | None = None,
    *,
    steps: int = 100,
    seed: int = 0,
    report: Path | str | None = None,
) -> RangeTest:
    """Find the learning rates that train a model, by letting the rate rise (Smith 2017).

    Args:
        model: a torch module; never changed.
        task: its training split and loss count.
        strategy: its optimizer, batch size and augmentation count; `Strategy()` by default.
        steps: at most so many, 10 to 10,000.
        seed: of the order of the data.
        report: file for a page with the curve.

    Raises:
        Refused: bad arguments; no rate at which the loss falls.

    >>> import numpy as np, torch
    >>> x = np.random.default_rng(0).standard_normal((400, 4)).astype(np.float32)
    >>> found = range_test(torch.nn.Linear(4, 2), Task(train=(x, (x[:, 0] > 0).astype(int))))
    >>> found.suggestion < found.highest
    True
    """
    if not LEAST <= steps <= MOST:
        raise Refused(
            f"must be a number of {LEAST} to {MOST:,}",
            value=steps,
            place="range_test.steps",
            fix="give steps=100",
            code=Exit.USAGE,
        )
    strategy, task, backend = strategy or Strategy(), task.prepare(seed), backend_for(model)
    if backend.name != "torch":
        raise refuse_framework(backend)
    found = run_range_test(
        model,
        backend,
        task.train,
        make_objective(task, strategy.label_smoothing),
        strategy.with_batch_size(task),
        steps=steps,
        seed=seed,
    )
    if report is not None:
        write_range_report(strategy.optimizer, asdict(found), Path(report).expanduser())
    return found
