"""Distillation from the outputs of the original model, or of any other."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, ValidationInfo, field_validator

from penjing.calibration.synthetic import TrainingData, with_synthetic_training
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model
from penjing.train.hooks import Hooks
from penjing.train.matching import Name
from penjing.train.outcome import trained
from penjing.train.teacher import Progress, Taught, Teaching, taught

EXAMPLES = 1024
"""Inputs that are made where nothing is said."""


@dataclass(frozen=True)
class Kind:
    """What a loss takes where nothing is said; None where it has no such thing."""

    alpha: float
    temperature: float | None
    standardize: bool | None = None
    balance: tuple[float, float] | None = None
    rise: float = 0.0


KINDS: dict[Name, Kind] = {
    "logits": Kind(0.9, 2.0, standardize=True),
    "dkd": Kind(0.5, 4.0, standardize=False, balance=(1.0, 8.0), rise=20 / 240),
    "dist": Kind(0.5, 4.0, standardize=False, balance=(2.0, 2.0)),
    "mse": Kind(0.9, None),
    "ranking": Kind(0.9, 1.0),
}
"""By name; those of `dkd` and `dist` are their papers' for CIFAR-100, halved with the task's own loss."""


class Distill(Taught):
    """Train towards the outputs of the model as it was before the plan, or of a teacher (`pj.distill`).

    The loss is `alpha` of that between the outputs of the two and the rest of the task's own. The teacher
    never changes. In outputs with more than two axes every position is a row; those whose label is -100 are
    left out.

    Attributes:
        loss: `logits`: Hinton's (2015), with the logits of both standardized (Sun et al., CVPR 2024) unless
            `standardize` is false; `dkd`: the label's class and the others apart (Zhao et al., CVPR 2022);
            `dist`: correlation between and within classes (Huang et al., NeurIPS 2022); `mse`: mean squared
            difference of outputs of any shape; `ranking`: which of the candidates of a row `[n, candidates]`
            is first (Cao et al., ICML 2007; a candidate that the teacher scores minus infinity is none).
        temperature: softens both distributions; None: the loss's own, 2 for `logits`, 4 for `dkd` and
            `dist`, 1 for `ranking`. `mse` has none.
        alpha: share of the teacher's loss in [0, 1]; at 1 labels are not used (but by `dkd`). None: the
            loss's own, 0.5 for `dkd` and `dist`, 0.9 for the others, and 1 without data.
        standardize: whether logits are standardized row by row first, where there are more than two; None:
            in `logits` only. `mse` and `ranking` cannot.
        balance: weights of the two parts of `dkd` (the label's class, the others: 1 and 8 by default) or of
            `dist` (between, within classes: 2 and 2); the other losses have none.
        rise: share of the training in which the teacher's loss rises to its weight, in [0, 1]; None: 1/12
            for `dkd`, none for the others.
        cache: whether the teacher's outputs are kept on disk for the next training with the same teacher and
            data, where the data are arrays, each is seen at least once, and `max_seconds` is none.
        data: what is trained on: `train`; without data `synthetic`, inputs made so that the teacher's
            BatchNorm layers see in them the moments that they keep (Cai et al. 2020, "ZeroQ"), or `noise` of
            unit variance. Of the task's training data only shapes and types are used then, and no labels.
        examples: inputs that are made, at least 2; None: 1,024.

    >>> Distill(epochs=2, loss="dkd")
    Distill(epochs=2.0, loss='dkd')
    """

    loss: Name = "logits"
    temperature: float | None = Field(default=None, gt=0, le=1000)
    alpha: float | None = Field(default=None, ge=0, le=1)
    standardize: bool | None = None
    balance: tuple[float, float] | None = None
    rise: float | None = Field(default=None, ge=0, le=1)
    cache: bool = True
    data: TrainingData = "train"
    examples: int | None = Field(default=None, ge=2)

    @field_validator("data")
    @classmethod
    def _unlabelled(cls, data: TrainingData, info: ValidationInfo) -> TrainingData:
        if data == "train":
            return data
        if info.data.get("alpha") not in (None, 1):
            raise ValueError("inputs that are made have no labels: alpha is 1")
        if info.data.get("loss") == "dkd":
            raise ValueError("inputs that are made have no labels, and the loss dkd reads them")
        if info.data.get("rise"):
            raise ValueError(
                "inputs that are made have no labels: no loss goes before while the teacher's may rise"
            )
        return data

    @field_validator("examples")
    @classmethod
    def _made(cls, examples: int | None, info: ValidationInfo) -> int | None:
        if examples is not None and info.data.get("data") == "train":
            raise ValueError("examples are made where data is 'synthetic' or 'noise'")
        return examples

    @field_validator("temperature", "standardize", "balance")
    @classmethod
    def _has_it(cls, value: object, info: ValidationInfo) -> object:
        loss = info.data.get("loss", "logits")
        if value is not None and info.field_name and getattr(KINDS[loss], info.field_name) is None:
            raise ValueError(f"the loss {loss} has no {info.field_name}")
        return value

    @field_validator("balance")
    @classmethod
    def _weigh(cls, balance: tuple[float, float] | None) -> tuple[float, float] | None:
        if balance is not None and (min(balance) < 0 or max(balance) == 0):
            raise ValueError("weights are at least 0, one of them above")
        return balance

    @property
    def teaching(self) -> Teaching:
        """Return how the teacher teaches, with the loss's own where nothing is said."""
        own = KINDS[self.loss]
        alpha = own.alpha if self.data == "train" else 1.0
        return Teaching.by(
            self,
            temperature=self.temperature or own.temperature or 1.0,
            alpha=alpha if self.alpha is None else self.alpha,
            standardize=bool(own.standardize if self.standardize is None else self.standardize),
            loss=self.loss,
            parts=self.balance or own.balance or (1.0, 1.0),
            rise=own.rise if self.rise is None else self.rise,
            cache=self.cache and self.epochs >= 1 and self.max_seconds is None,
        )


@handles(Distill, "torch")
def distill_torch(model: Model, method: Distill, context: Context) -> Outcome:
    """Distil `context.original` into a torch module; one change for the model.

    Raises:
        Refused: what `penjing.train.loop.fit` refuses, or inputs that cannot be made.
    """
    progress, labelled = Progress(), method.data == "train"
    if not labelled:
        context = with_synthetic_training(context.original, context, method.examples or EXAMPLES, method.data)
    with taught(context, method.teaching, progress) as (split, objective):
        return trained(model, method, context, objective, split, Hooks(stepped=progress.stepped), labelled)
