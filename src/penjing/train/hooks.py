"""What a caller may do while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _silent(line: str) -> None:
    return None


def _nothing(progress: float) -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """Functions that the training loop calls; by default they do nothing.

    Attributes:
        say: called with a line of progress once an epoch.
        gradients: called when the gradients of a step are there, before they are clipped.
        stepped: called after the optimizer's step.

    The last two get the share of the training that lies behind, in [0, 1).
    """

    say: Callable[[str], None] = _silent
    gradients: Callable[[float], None] = _nothing
    stepped: Callable[[float], None] = _nothing


NO_HOOKS = Hooks()
