"""Looks at the validation data while a model trains, and says what is to change."""

from __future__ import annotations

from typing import Any

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
from penjing.train.hooks import Moment, Reaction
from penjing.train.strategy import Strategy

ALPHA = 0.05
"""Level of the one-sided paired tests."""

CUT = 0.1
"""Factor on the rate at a plateau."""

PLATEAU = 3
"""Looks without an improvement that make a plateau, where the strategy has no patience of its own."""


class Point(Value):
    """One look: after how many epochs, seconds of training and examples, the loss and the metric on valid."""

    epoch: float
    seconds: float
    step: int
    loss: float | None
    quality: float


class Monitor:
    """The hook of a training run that keeps its curve.

    An improvement or a loss against the best look counts where a paired test on the same examples sees it
    (McNemar's, exact), or, for metrics that are no mean over examples, where the value says so.

    Args:
        model: the model that trains, as it is judged.
        backend: of it.
        task: its valid split and metric judge.
        strategy: how it trains.
        goal: where training ends; None: nowhere.
        say: gets a line a look.
    """

    def __init__(
        self,
        model: Any,
        backend: Backend,
        task: Task,
        strategy: Strategy,
        goal: Goal | None,
        say: Say,
    ) -> None:
        self.points: list[Point] = []
        self.reached: Point | None = None
        self._model, self._backend, self._task = model, backend, task
        self._strategy, self._goal, self._say = strategy, goal, say
        self._best: dict[str, Any] | None = None
        self._right: NDArray[np.bool_] | None = None
        self._quality = np.nan
        self._waited = 0
        self._back = False

    def __call__(self, moment: Moment) -> Reaction:
        """Look, and answer what changes."""
        with moment.shown():
            outputs = self._outputs()
            quality = metric_value(self._task, outputs, self._targets)
            loss = moment.loss if np.isfinite(moment.loss) else None
            point = Point(
                epoch=moment.epoch, seconds=moment.seconds, step=moment.step, loss=loss, quality=quality
            )
            self.points.append(point)
            words = "" if loss is None else f"loss {loss:.4g}, "
            name = metric_name(self._task)
            text = f"epoch {moment.epoch:.3g}: {words}{name} {quality:.4g}, {moment.seconds:.1f} s"
            self._say(Line.training(text))
            if self._goal is not None and self._goal.met(quality):
                self.reached = point
                why = f"the goal {self._goal} is reached with {quality:.4g}"
                return Reaction(stop=True, reason=why, as_shown=True)
            if self._strategy.patience is None and self._strategy.decline != "plateau":
                return Reaction()
            return self._patient(outputs, quality)

    def measure(self, steps: int, averaged: bool) -> float:
        """Return the metric of the model in the end; the last look has it where that saw these weights.

        Args:
            steps: that were taken.
            averaged: whether a look sees other weights than those of the last step.
        """
        last = self.points[-1] if self.points else None
        same = self.reached is not None or not averaged
        if last is not None and last.step == steps and same and not self._back:
            return last.quality
        return metric_value(self._task, self._outputs(), self._targets)

    def keep_best(self) -> None:
        """Put the weights of the best look back where training ended for want of an improvement."""
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
        self.points = [Point(**point) for point in state["points"]]
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

    def _patient(self, outputs: NDArray[Any], quality: float) -> Reaction:
        right = per_example(self._task, outputs, self._targets)
        better, worse = self._against_best(right, quality)
        if better:
            self._best = {name: t.detach().clone() for name, t in self._model.state_dict().items()}
            self._right, self._quality, self._waited = right, quality, 0
            return Reaction()
        self._waited += 1
        patience = self._strategy.patience
        if patience is not None and worse:
            self._back = True
            why = f"over-fitting: {quality:.4g} is worse than the best look's {self._quality:.4g}"
            return Reaction(stop=True, reason=f"{why}; training ends with the best look's weights")
        if self._waited < (patience or PLATEAU):
            return Reaction()
        why = f"plateau: no improvement on {self._quality:.4g} in {self._waited} looks"
        self._waited = 0
        if self._strategy.decline == "plateau":
            return Reaction(slow=CUT, reason=f"{why}; learning rate divided by {1 / CUT:.0f}")
        self._back = True
        return Reaction(stop=True, reason=f"{why}; training ends with the best look's weights")

    def _against_best(self, right: NDArray[np.bool_] | None, quality: float) -> tuple[bool, bool]:
        """Tell whether a look is better or worse than the best one, as far as the data can tell."""
        if self._best is None:
            return True, False
        if right is None or self._right is None:
            up = quality > self._quality if maximized(self._task) else quality < self._quality
            return up, False
        gained, lost = int((right & ~self._right).sum()), int((~right & self._right).sum())
        return superiority_p_value(gained, lost) < ALPHA, superiority_p_value(lost, gained) < ALPHA
