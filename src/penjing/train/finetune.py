"""Fine-tuning: train the changed model on the task's own loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.train.method import TrainingMethod

if TYPE_CHECKING:
    from torch import nn


class FineTune(TrainingMethod):
    """Train on the task's training split and loss.

    After pruning a short training brings most of the lost quality back (Han et al., NeurIPS 2015);
    `Distill` usually brings more, as it needs no labels to know what the model did before.

    >>> FineTune(epochs=2)
    FineTune(epochs=2.0)
    """


@handles(FineTune, "torch")
def fine_tune_torch(model: nn.Module, method: FineTune, context: Context) -> Outcome:
    """Fine-tune a torch module; refuses as `penjing.train.loop.fit` does."""
    from penjing.train.objective import make_objective
    from penjing.train.outcome import train_by_method

    objective = make_objective(context.task, method.strategy.label_smoothing)
    return train_by_method(model, method, context, objective)
