"""What a caller may do while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from penjing.core.progress import Say, silent


@dataclass(frozen=True)
class Moment:
    """Where training is when a caller is asked.

    Attributes:
        epoch: passes over the data that lie behind; may be a fraction.
        step: steps taken, of `total`.
        loss: mean objective of the last pass, or of the part of it; NaN where no step counted.
        seconds: of training, without what the caller took.
        shown: a context in which the model has the weights that it is judged by.
    """

    epoch: float
    step: int
    total: int
    loss: float
    seconds: float
    shown: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Reaction:
    """What is to change.

    Attributes:
        stop: whether training ends here.
        slow: factor on the rate from here on.
        reason: of it, in words.
        as_shown: whether training that ends here leaves the very weights and statistics that were shown.
    """

    stop: bool = False
    slow: float = 1.0
    reason: str = ""
    as_shown: bool = False


ON = Reaction()


def is_watched(model: Any) -> bool:
    """Tell whether a torch module's layers have hooks, which compiled or spread calls may not reach."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def _nothing(progress: float) -> None:
    return None


def _on(moment: Moment) -> Reaction:
    return ON


@dataclass(frozen=True)
class Hooks:
    """Functions that the training loop calls; by default they do nothing.

    Attributes:
        say: called with a line of progress once an epoch.
        gradients: called when the gradients of a step are there, before they are clipped.
        stepped: called after the optimizer's step.
        passed: called after every `every` epochs and at the end; what it returns changes the training.
        every: epochs between two such calls, above 0.

    `gradients` and `stepped` get the share of the training that lies behind, in [0, 1).
    """

    say: Say = silent
    gradients: Callable[[float], None] = _nothing
    stepped: Callable[[float], None] = _nothing
    passed: Callable[[Moment], Reaction] = _on
    every: float = 1.0


NO_HOOKS = Hooks()
