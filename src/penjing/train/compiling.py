"""The model's call in training: as it is, or through `torch.compile` where that pays back within the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from penjing.core.errors import Exit, Refused
from penjing.train.hooks import is_watched
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

EAGER_STEPS, COMPILED_STEPS = 12, 8
"""Steps that are timed before and after compiling; the first two, and the one that compiles, do not count."""

WORTH_S = 600.0
"""Seconds of training to come from which on compiling is tried: it takes about one minute or two."""

GAIN = 0.95
"""Compiled steps stay where they take at most this share of the time of others."""


def find_obstacle(strategy: Strategy, model: nn.Module, world_size: int) -> str:
    """Say why steps of a strategy on a model cannot be compiled; an empty text where they can.

    >>> from torch import nn
    >>> find_obstacle(Strategy(recompute=True), nn.Linear(1, 1), world_size=1)
    'recompute changes what a step computes'
    """
    changing = {
        "start_size": strategy.start_size < 1,
        "stochastic_depth": strategy.stochastic_depth > 0,
        "recompute": strategy.recompute,
        "sam": strategy.sam is not None,
        "ghost_batch": strategy.ghost_batch is not None,
    }
    for name, changes in changing.items():
        if changes:
            return f"{name} changes what a step computes"
    if world_size > 1:
        return f"{world_size} processes train together"
    if is_watched(model):
        return "its layers are watched"
    return ""


class Forward:
    """Calls a model, compiled or not; inputs of other shapes than the first compiled ones are not compiled.

    Attributes:
        events: what was decided, in words.
    """

    def __init__(self, call: Callable[..., Any], choice: str, reason: str = "") -> None:
        """Wrap a call.

        Args:
            call: of the model.
            choice: `never`, `auto` or `always`, as in `Strategy.compile`.
            reason: why it cannot be compiled, if so.

        Raises:
            Refused: it cannot be, and always has to.
        """
        self.events: list[str] = []
        self._call, self._choice = call, choice
        self._compiled: Callable[..., Any] | None = None
        self._shapes: list[Any] | None = None
        self._times: list[float] = []
        self._eager_s = self._first_s = 0.0
        self._settled = choice != "auto"
        if choice == "always":
            if reason:
                raise Refused(
                    "a training step must be one that torch.compile can take",
                    value=reason,
                    place="compile",
                    fix="take compile='never'",
                )
            self._compile()
        elif choice == "auto" and reason:
            self._settle(f"not compiled: {reason}")

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the model gives."""
        if self._compiled is None:
            return self._call(*inputs)
        shapes = [(x.shape, x.dtype) for x in inputs]
        if self._shapes is None:
            return self._first(inputs, shapes)
        return self._compiled(*inputs) if shapes == self._shapes else self._call(*inputs)

    def record_step(self, seconds: float, left: int) -> None:
        """Note how long a step took, and how many steps are left; decide when enough is known."""
        if self._settled:
            return
        self._times.append(seconds)
        if self._compiled is None:
            if len(self._times) == EAGER_STEPS:
                self._eager_s = median(self._times[2:])
                if left * self._eager_s < WORTH_S:
                    self._settle(f"not compiled: less than {WORTH_S / 60:g} minutes are left")
                else:
                    self._compile()
                    self._times.clear()
        elif len(self._times) == 1 + COMPILED_STEPS:
            self._judge(left)

    def state(self) -> list[Any]:
        """Return all that `restore` needs; what is being timed is timed anew."""
        return [self._settled, self._compiled is not None, self.events]

    def restore(self, state: list[Any]) -> None:
        """Go on with what was decided."""
        self._settled, compiled, self.events[:] = state
        if self._settled and compiled:
            self._compile()

    def _judge(self, left: int) -> None:
        first, after = self._times[0], median(self._times[1:])
        facts = f"compiling took {first - after:.0f} s, a step {after:.3g} s instead of {self._eager_s:.3g} s"
        if after <= GAIN * self._eager_s:
            needed = (first - after) / (self._eager_s - after)
            self._settle(f"compiled by torch.compile: {facts}; paid back after {needed:.0f} of {left} steps")
        else:
            self._compiled = None
            self._settle(f"not compiled: {facts}")

    def _settle(self, event: str) -> None:
        self._settled = True
        self.events.append(event)

    def _compile(self) -> None:
        import torch

        with _quietly():
            self._compiled, self._shapes = torch.compile(self._call, dynamic=False), None

    def _first(self, inputs: tuple[Tensor, ...], shapes: list[Any]) -> Any:
        assert self._compiled is not None
        try:
            with _quietly():
                found = self._compiled(*inputs)
        except Exception as error:
            # Compilers may raise anything.
            line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            if self._choice == "always":
                raise Refused(
                    "torch.compile must take the model",
                    value=line,
                    place="compile",
                    fix="take compile='never'",
                    code=Exit.ENVIRONMENT,
                ) from error
            self._compiled = None
            self._settle(f"not compiled: {line}")
            return self._call(*inputs)
        self._shapes = shapes
        return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what torch's own compiler warns of on its way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
