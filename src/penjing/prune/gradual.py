"""Make weights zero while the network trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from penjing.arrays.sparsity.ramp import Ramp, ramp_at, round_sparsity
from penjing.calibration.candidates import describe_mask, find_candidates
from penjing.calibration.settings import Sparse
from penjing.core.context import Context
from penjing.core.method import Change, Outcome
from penjing.core.registry import handles
from penjing.core.task import Split
from penjing.core.value import Model
from penjing.train.hooks import NO_HOOKS, Hooks
from penjing.train.method import TrainingMethod
from penjing.train.objective import Objective, make_objective
from penjing.train.outcome import train_by_method
from penjing.train.sparsify import MaskChoice, Schedule, Sparsifier
from penjing.train.teacher import DistillationConfig, prepare_distillation

if TYPE_CHECKING:
    from torch import Tensor, nn


class PruneGradually(Sparse, TrainingMethod):
    """Make more and more weights zero while the others train.

    Attributes:
        scope: `global`: one threshold for all layers; `layer`: the same share of zeros in every layer.
        floor: with `global`, the share of its weights that every layer keeps at least, from 0 to below 1.
        ramp: how sparsity rises: `cubic` from `begin` to `end` (Zhu & Gupta 2017); `constant`: all of it
            from `begin`, the masks chosen anew until `end`; `one_shot`: all of it at `begin`, once.
        begin, end: shares of the training between which masks change; after that they stay.
        updates: how many times masks are chosen between the two, at least 1.
        criterion: `magnitude`, or `movement` (Sanh et al. 2020), which needs training before the first mask.
        rewind: what follows `one_shot`: `rate`: `rounds` runs, before each of which weights go and the
            schedule of the learning rate starts anew (Renda et al. 2020); `weights`: a first run is dense,
            and before each of the `rounds` runs after it what is left goes back to what it was at `begin`
            of the first (Frankle et al. 2020); `none`: one run.
        rounds: runs with zeros, at least 1; each keeps the same share of what the one before it kept.
        alpha: share in the loss of Hinton's distillation from the original, in [0, 1]; the rest is the
            task's own.

    >>> PruneGradually(0.8, epochs=10, ramp="one_shot", rewind="rate", rounds=3).share
    0.8
    """

    scope: Literal["global", "layer"] = "global"
    floor: float = Field(default=0.02, ge=0, lt=1)
    ramp: Ramp = "cubic"
    begin: float = Field(default=0.0, ge=0, lt=1)
    end: float = Field(default=0.6, gt=0, le=1)
    updates: int = Field(default=30, ge=1, le=100_000)
    criterion: Literal["magnitude", "movement"] = "magnitude"
    rewind: Literal["none", "rate", "weights"] = "none"
    rounds: int = Field(default=1, ge=1, le=100)
    alpha: float = Field(default=0.0, ge=0, le=1)

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the same share of zeros."""
        return self.scope == "layer"

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self._has_a_sparsity()
        if self.end < self.begin:
            raise ValueError(f"end must not be before begin, got {self.end:g} and {self.begin:g}; raise end")
        if self.criterion == "movement" and self.ramp != "cubic" and not self.begin:
            raise ValueError("criterion 'movement' needs steps before the first mask; set begin above 0")
        if self.rewind != "none" and (self.ramp, self.criterion) != ("one_shot", "magnitude"):
            raise ValueError(
                f"rewind {self.rewind!r} needs all zeros at once, chosen by magnitude; "
                "write ramp='one_shot' and leave criterion as it is"
            )
        if self.rounds > 1 and self.rewind == "none":
            raise ValueError("rounds above 1 needs a rewind; write rewind='rate' or rewind='weights'")
        return self


@handles(PruneGradually, "torch")
def prune_gradually(model: Model, method: PruneGradually, context: Context) -> Outcome:
    """Train and mask; one change for the training, and one for every layer with a weight matrix."""
    found, changes = find_candidates(model, method, context)
    if not found:
        return Outcome(model, changes)
    names = tuple(f"{candidate.name}.weight" for candidate in found)
    run = {"none": _ramped, "rate": _rates_rewound, "weights": _weights_rewound}[method.rewind]
    with _objective(method, context) as (split, objective):
        runs = list(run(_Course(model, method, context, objective, split, names)))
    masks = context.backend.masks_of(model)  # type: ignore[attr-defined]
    for candidate in found:
        mask = masks.get(f"{candidate.name}.weight", np.ones(candidate.weight.shape, bool))
        changes.done(candidate.name, **describe_mask(mask))
    return Outcome(model, [_summary(runs), *changes])


@contextlib.contextmanager
def _objective(method: PruneGradually, context: Context) -> Iterator[tuple[Split | None, Objective]]:
    if not method.alpha:
        yield None, make_objective(context.task, method.strategy.label_smoothing)
        return
    with prepare_distillation(
        context, DistillationConfig.for_strategy(method.strategy, alpha=method.alpha)
    ) as lesson:
        yield lesson


@dataclass(frozen=True)
class _Course:
    """What every run of a method trains: the same model on the same data."""

    model: nn.Module
    method: PruneGradually
    context: Context
    objective: Objective
    split: Split | None
    names: tuple[str, ...]

    def train(self, hooks: Hooks = NO_HOOKS, runs: int = 1) -> Change:
        seconds = self.method.strategy.max_seconds
        method = self.method.model_copy(update={"max_seconds": seconds and seconds / runs})
        outcome = train_by_method(self.model, method, self.context, self.objective, self.split, hooks)
        return outcome.changes[0]

    def sparsifier(self, schedule: Schedule, moments: Sequence[float] = ()) -> Sparsifier:
        m = self.method
        choice = MaskChoice(m.criterion, m.zeros, m.scope, m.floor)
        return Sparsifier(self.model, self.names, choice, schedule, moments)


def _ramped(course: _Course) -> Iterator[Change]:
    m = course.method
    moments = [m.begin + (m.end - m.begin) * i / m.updates for i in range(m.updates + 1)]
    sparsifier = course.sparsifier(
        lambda progress: ramp_at(m.ramp, progress, m.begin, m.end, m.share),
        moments[:1] if m.ramp == "one_shot" else moments,
    )
    yield course.train(Hooks(after_backward=sparsifier.after_backward, after_step=sparsifier.after_step))
    sparsifier.finish()


def _rates_rewound(course: _Course) -> Iterator[Change]:
    m = course.method
    for number in range(1, m.rounds + 1):
        sparsifier = course.sparsifier(lambda progress: m.share)
        sparsifier.mask(round_sparsity(number, m.rounds, m.share))
        yield course.train(runs=m.rounds)


def _weights_rewound(course: _Course) -> Iterator[Change]:
    m = course.method
    early = _Early(course.model, m.begin)
    yield course.train(Hooks(after_step=early.after_step), m.rounds + 1)
    for number in range(1, m.rounds + 1):
        course.sparsifier(lambda progress: m.share).mask(round_sparsity(number, m.rounds, m.share))
        early.restore()
        yield course.train(runs=m.rounds + 1)


class _Early:
    """All tensors of a model as they were early in its training."""

    def __init__(self, model: nn.Module, begin: float) -> None:
        self._model, self._begin = model, begin
        self._state = None if begin else self._copy()

    def after_step(self, progress: float) -> None:
        if self._state is None and progress >= self._begin:
            self._state = self._copy()

    def restore(self) -> None:
        """Put the tensors back; masked weights stay zero."""
        from penjing.backends.torch.masks import enforce_masks

        self._model.load_state_dict(self._state or self._copy())
        enforce_masks(self._model)

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}


def _summary(runs: list[Change]) -> Change:
    """Return one change for all runs: losses of the first and the last, steps and seconds of all."""
    detail = dict(runs[-1].detail) | {"loss_before": runs[0].detail["loss_before"]}
    for name in ("steps", "seconds", "data_seconds"):
        detail[name] = round(sum(float(run.detail[name]) for run in runs), 3)
    return runs[-1].model_copy(update={"detail": detail | {"runs": len(runs)}})
