"""A training procedure: how a model is made and trained, as one value that can be sent to another process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penjing.core.errors import Exit, Refused
from penjing.core.progress import Say
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.experiments.fit import TrainingJob
from penjing.train.strategy import Strategy


@dataclass(frozen=True)
class TrainingProcedure:
    """Makes a trained model from a task and a seed.

    Attributes:
        make: a function that makes a model, or that returns a trained one from `(task, seed)`.
        strategy: how the model trains; None where `make` trains it.
    """

    make: Callable[..., Model]
    strategy: Strategy | None

    def train(self, task: Task, seed: int, say: Say) -> Model:
        """Return a trained model; the same seed gives the same.

        Raises:
            Refused: what training refuses.
        """
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.strategy is None:
                return self.make(task, seed)
            model = self.make()
        TrainingJob(model, task, self.strategy.with_batch_size(task), None, seed).run(say)
        return model


def read_procedure(given: object) -> TrainingProcedure:
    """Read a procedure: `(function that makes a model, Strategy)`, or a function of (task, seed).

    Raises:
        Refused: anything else.

    >>> read_procedure((dict, Strategy(epochs=1))).strategy
    Strategy(epochs=1.0)
    """
    if isinstance(given, TrainingProcedure):
        return given
    if isinstance(given, tuple) and len(given) == 2 and callable(given[0]) and isinstance(given[1], Strategy):
        return TrainingProcedure(given[0], given[1])
    if callable(given):
        return TrainingProcedure(given, None)
    raise Refused(
        "must be a function that makes a model with a Strategy, or a function of (task, seed)",
        value=type(given).__name__,
        place="procedure",
        fix="write stability((make, Strategy(epochs=3)), task, out='runs')",
        code=Exit.USAGE,
    )
