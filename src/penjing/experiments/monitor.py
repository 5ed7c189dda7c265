"""Evaluates on the validation data while a model trains, and decides what is to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.statistics import superiority_p_value
from penjing.core.backend import Backend
from penjing.core.goal import Goal
from penjing.core.progress import Line, Say
from penjing.core.task import Task
from penjing.core.value import Value
from penjing.measurement.nondeterminism import outputs_of
from penjing.measurement.quality import maximized, metric_name, metric_value, per_example
from penjing.train.hooks import Decision, TrainingProgress
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

ALPHA = 0.05
"""Level of the one-sided paired tests."""

CUT = 0.1
"""Factor on the rate at a plateau."""

PLATEAU = 3
"""Evaluations without an improvement that make a plateau, where the strategy has no patience of its own."""


class CurvePoint(Value):
    """One evaluation: after how many epochs, seconds and steps of training; loss, and metric on valid."""

    epoch: float
    seconds: float
    step: int
    loss: float | None
    quality: float


class Monitor:
    """The `evaluate` hook of a training run that keeps its curve.

    An improvement or a loss against the best evaluation counts where a paired test on the same examples sees
    it (McNemar's, exact), or, for metrics that are no mean over examples, where the value says so.

    Args:
        model: the model that trains, with the output that counts.
        backend: of it.
        task: its valid split and metric judge.
        strategy: how it trains.
        goal: where training ends; None: nowhere.
        say: gets a line an evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        task: Task,
        strategy: Strategy,
        goal: Goal | None,
        say: Say,
    ) -> None:
        self.points: list[CurvePoint] = []
        self.reached: CurvePoint | None = None
        self._model, self._backend, self._task = model, backend, task
        self._strategy, self._goal, self._say = strategy, goal, say
        self._best: dict[str, Tensor] | None = None
        self._right: NDArray[np.bool_] | None = None
        self._quality = np.nan
        self._waited = 0
        self._back = False

    def __call__(self, progress: TrainingProgress) -> Decision:
        """Evaluate, and decide what changes."""
        with progress.evaluated_weights():
            outputs = self._outputs()
            quality = metric_value(self._task, outputs, self._targets)
            loss = progress.loss if np.isfinite(progress.loss) else None
            point = CurvePoint(
                epoch=progress.epoch, seconds=progress.seconds, step=progress.step, loss=loss, quality=quality
            )
            self.points.append(point)
            words = "" if loss is None else f"loss {loss:.4g}, "
            name = metric_name(self._task)
            text = f"epoch {progress.epoch:.3g}: {words}{name} {quality:.4g}, {progress.seconds:.1f} s"
            self._say(Line.training(text))
            if self._goal is not None and self._goal.met(quality):
                self.reached = point
                why = f"the goal {self._goal} is reached with {quality:.4g}"
                return Decision(stop=True, reason=why, keep_evaluated=True)
            if self._strategy.patience is None and self._strategy.lr_schedule != "plateau":
                return Decision()
            return self._patient(outputs, quality)

    def measure(self, steps: int, averaged: bool) -> float:
        """Return the metric of the model in the end; the last evaluation has it where it saw these weights.

        Args:
            steps: that were taken.
            averaged: whether an evaluation sees other weights than those of the last step.
        """
        last = self.points[-1] if self.points else None
        same = self.reached is not None or not averaged
        if last is not None and last.step == steps and same and not self._back:
            return last.quality
        return metric_value(self._task, self._outputs(), self._targets)

    def restore_best(self) -> None:
        """Put the weights of the best evaluation back where training ended for want of an improvement."""
        if self._back and self._best is not None:
            self._model.load_state_dict(self._best)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on."""
        import torch

        return {
            "points": [point.model_dump() for point in self.points],
            "best": self._best,
            "right": None if self._right is None else torch.from_numpy(self._right.copy()),
            "numbers": [self._quality, self._waited],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.points = [CurvePoint(**point) for point in state["points"]]
        self._best = state["best"]
        self._right = None if state["right"] is None else state["right"].numpy()
        self._quality, self._waited = state["numbers"]

    @property
    def _targets(self) -> NDArray[Any]:
        targets: NDArray[Any] = self._task.valid.arrays()[1]
        return targets

    def _outputs(self) -> NDArray[Any]:
        n, size = len(self._task.valid), max(self._task.batch_size, 256)
        return outputs_of(self._backend, self._model, self._task, n, size)

    def _patient(self, outputs: NDArray[Any], quality: float) -> Decision:
        right = per_example(self._task, outputs, self._targets)
        better, worse = self._against_best(right, quality)
        if better:
            self._best = {name: t.detach().clone() for name, t in self._model.state_dict().items()}
            self._right, self._quality, self._waited = right, quality, 0
            return Decision()
        self._waited += 1
        patience = self._strategy.patience
        if patience is not None and worse:
            self._back = True
            why = f"over-fitting: {quality:.4g} is worse than the best evaluation's {self._quality:.4g}"
            return Decision(stop=True, reason=f"{why}; training ends with the best evaluation's weights")
        if self._waited < (patience or PLATEAU):
            return Decision()
        why = f"plateau: no improvement on {self._quality:.4g} in {self._waited} evaluations"
        self._waited = 0
        if self._strategy.lr_schedule == "plateau":
            return Decision(lr_factor=CUT, reason=f"{why}; learning rate divided by {1 / CUT:.0f}")
        self._back = True
        return Decision(stop=True, reason=f"{why}; training ends with the best evaluation's weights")

    def _against_best(self, right: NDArray[np.bool_] | None, quality: float) -> tuple[bool, bool]:
        """Tell whether an evaluation is better or worse than the best one, as far as the data can tell."""
        if self._best is None:
            return True, False
        if right is None or self._right is None:
            up = quality > self._quality if maximized(self._task) else quality < self._quality
            return up, False
        gained, lost = int((right & ~self._right).sum()), int((~right & self._right).sum())
        return superiority_p_value(gained, lost) < ALPHA, superiority_p_value(lost, gained) < ALPHA
