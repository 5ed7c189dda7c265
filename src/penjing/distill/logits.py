"""Distillation from the logits of the original model."""

from __future__ import annotations

from pydantic import Field

from penjing.core.context import Context
from penjing.core.method import Model, Outcome, handles
from penjing.train.outcome import trained
from penjing.train.strategy import Strategy
from penjing.train.teacher import Teaching, taught


class Distill(Strategy):
    """Train towards the outputs of the model as it was before the plan.

    The loss is `alpha` of Hinton's (2015) with the logits of both standardized (Sun et al., CVPR 2024) and
    the rest of the task's own. The teacher never changes.

    Attributes:
        temperature: softens both distributions.
        alpha: share of the teacher's loss in [0, 1]; at 1 labels are not used.
        standardize: whether logits are standardized row by row first.

    >>> Distill(epochs=2)
    Distill(epochs=2.0)
    """

    temperature: float = Field(default=2.0, gt=0, le=1000)
    alpha: float = Field(default=0.9, ge=0, le=1)
    standardize: bool = True


@handles(Distill, "torch")
def distill_torch(model: Model, method: Distill, context: Context) -> Outcome:
    """Distil `context.original` into a torch module; refuses as `penjing.train.loop.fit` does."""
    teaching = Teaching(method.temperature, method.alpha, method.standardize, method.precision)
    with taught(context, teaching) as (split, objective):
        return trained(model, method, context, objective, split)
