"""Distillation from the outputs of the original model, or of any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from penjing.calibration.synthetic import TrainingData, with_synthetic_training
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.train.hooks import Hooks
from penjing.train.matching import LossName
from penjing.train.method import DistillationMethod
from penjing.train.outcome import train_by_method
from penjing.train.teacher import DistillationConfig, TrainingShare, prepare_distillation

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = 1024
"""Inputs that are made where nothing is said."""


@dataclass(frozen=True)
class LossDefaults:
    """What a loss takes where nothing is said; None where it has no such thing."""

    alpha: float
    temperature: float | None
    standardize: bool | None = None
    balance: tuple[float, float] | None = None
    loss_warmup: float = 0.0


LOSSES: dict[LossName, LossDefaults] = {
    "auto": LossDefaults(0.9, 2.0, standardize=True),
    "logits": LossDefaults(0.9, 2.0, standardize=True),
    "dkd": LossDefaults(0.5, 4.0, standardize=False, balance=(1.0, 8.0), loss_warmup=20 / 240),
    "dist": LossDefaults(0.5, 4.0, standardize=False, balance=(2.0, 2.0)),
    "mse": LossDefaults(0.9, None),
    "ranking": LossDefaults(0.9, 1.0),
    "sigmoid": LossDefaults(0.9, 2.0),
}
"""By name; those of `dkd` and `dist` are their papers' for CIFAR-100, halved with the task's own loss."""


class Distill(DistillationMethod):
    """Train towards the outputs of the model as it was before the plan, or of a teacher (`pj.distill`).

    The loss is `alpha` of that between the outputs of the two and the rest of the task's own. The teacher
    never changes. In outputs with more than two axes every position is a row; those whose label is -100 are
    left out.

    Attributes:
        loss: `auto`: by what the outputs are (`penjing.core.kind`), `logits` for classes, `sigmoid` for
            labels, `mse` for numbers; `logits`: Hinton's (2015), with the logits of both standardized (Sun et
            al., CVPR 2024) unless `standardize` is false; `sigmoid`: divergence of labels that are
            independent of each other, each with a logit; `dkd`: the label's class and the others apart
            (Zhao et al., CVPR 2022);
            `dist`: correlation between and within classes (Huang et al., NeurIPS 2022); `mse`: mean squared
            difference of outputs of any shape; `ranking`: which of the candidates of a row `[n, candidates]`
            is first (Cao et al., ICML 2007; a candidate that the teacher scores minus infinity is none).
        temperature: softens both distributions; None: the loss's own, 2 for `logits` and `sigmoid`, 4
            for `dkd` and `dist`, 1 for `ranking`. `mse` has none.
        alpha: share of the teacher's loss in [0, 1]; at 1 labels are not used (but by `dkd`). None: the
            loss's own, 0.5 for `dkd` and `dist`, 0.9 for the others, and 1 without data.
        standardize: whether logits are standardized row by row first, where there are more than two; None:
            in `logits` only. `mse`, `sigmoid` and `ranking` cannot.
        balance: weights of the two terms of `dkd` (the label's class, the others: 1 and 8 by default) or of
            `dist` (between, within classes: 2 and 2); the other losses have none.
        loss_warmup: share of the training in which the teacher's loss rises to its weight, in [0, 1]; None:
            1/12 for `dkd`, 0 for the others.
        cache: whether the teacher's outputs are kept on disk for the next training with the same teacher and
            data, where the data are arrays, each is seen at least once, and `max_seconds` is none.
        data: what is trained on: `train`; without data `synthetic`, inputs made so that the teacher's
            BatchNorm layers see in them the moments that they keep (Cai et al. 2020, "ZeroQ"), or `noise` of
            unit variance. Of the task's training data only shapes and types are used then, and no labels.
        examples: inputs that are made, at least 2; None: 1,024.

    >>> Distill(epochs=2, loss="dkd")
    Distill(epochs=2.0, loss='dkd')
    """

    loss: LossName = "auto"
    temperature: float | None = Field(default=None, gt=0, le=1000)
    alpha: float | None = Field(default=None, ge=0, le=1)
    standardize: bool | None = None
    balance: tuple[float, float] | None = None
    loss_warmup: float | None = Field(default=None, ge=0, le=1)
    cache: bool = True
    data: TrainingData = "train"
    examples: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        defaults = LOSSES[self.loss]
        for name in ("temperature", "standardize", "balance"):
            if getattr(self, name) is not None and getattr(defaults, name) is None:
                raise ValueError(f"{name} cannot be given for loss {self.loss!r}; leave it out")
        if self.balance is not None and (min(self.balance) < 0 or max(self.balance) == 0):
            raise ValueError("balance needs weights of at least 0, one of them above 0; give (1, 8)")
        if self.data == "train":
            if self.examples is not None:
                raise ValueError("examples cannot be given with data='train'; take data='synthetic'")
            return self
        if self.alpha not in (None, 1):
            raise ValueError(f"alpha must be 1 with data={self.data!r}, which has no labels; leave it out")
        if self.loss == "dkd":
            raise ValueError(f"loss 'dkd' cannot do without labels, with data={self.data!r}; take 'logits'")
        if self.loss_warmup:
            raise ValueError(f"loss_warmup must be 0 with data={self.data!r}, without labels; leave it out")
        return self

    @property
    def config(self) -> DistillationConfig:
        """Return how the teacher teaches, with the loss's own where nothing is said."""
        own, strategy = LOSSES[self.loss], self.strategy
        alpha = own.alpha if self.data == "train" else 1.0
        return DistillationConfig.for_strategy(
            strategy,
            temperature=self.temperature or own.temperature or 1.0,
            alpha=alpha if self.alpha is None else self.alpha,
            standardize=bool(own.standardize if self.standardize is None else self.standardize),
            loss=self.loss,
            balance=self.balance or own.balance or (1.0, 1.0),
            loss_warmup=own.loss_warmup if self.loss_warmup is None else self.loss_warmup,
            cache=self.cache and strategy.epochs >= 1 and strategy.max_seconds is None,
        )


@handles(Distill, "torch")
def distill_torch(model: nn.Module, method: Distill, context: Context) -> Outcome:
    """Distil `context.original` into a torch module; one change for the model.

    Raises:
        Refused: what `penjing.train.loop.fit` refuses, or inputs that cannot be made.
    """
    progress, labelled = TrainingShare(), method.data == "train"
    if not labelled:
        context = with_synthetic_training(context.original, context, method.examples or EXAMPLES, method.data)
    with prepare_distillation(context, method.config, progress) as (split, objective):
        return train_by_method(
            model, method, context, objective, split, Hooks(after_step=progress.update), labelled
        )
