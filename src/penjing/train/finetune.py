"""Fine-tuning: train the changed model on the task's own loss."""

from __future__ import annotations

from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model
from penjing.train.strategy import Strategy


class FineTune(Strategy):
    """Train on the task's training split and loss.

    After pruning a short training brings most of the lost quality back (Han et al., NeurIPS 2015);
    `Distill` usually brings more, as it needs no labels to know what the model did before.

    >>> FineTune(epochs=2)
    FineTune(epochs=2.0)
    """


@handles(FineTune, "torch")
def fine_tune_torch(model: Model, method: FineTune, context: Context) -> Outcome:
    """Fine-tune a torch module; refuses as `penjing.train.loop.fit` does."""
    from penjing.train.objective import task_objective
    from penjing.train.outcome import trained

    return trained(model, method, context, task_objective(context.task, method.label_smoothing))
