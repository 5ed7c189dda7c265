"""Averages of the weights on the way, and the weights that a model is evaluated by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from penjing.train.sharding import shard_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

HORIZON = 0.05
"""Share of the training that an exponential average looks back over."""

SWA_FROM = 0.75
"""Share of the way from which on `swa` averages."""

POINTS = 50
"""Points of the whole way at which `swa` and `latest` take the weights."""

LATEST = 5
"""Points that `latest` averages over."""


class WeightAverage:
    """Keeps an average of a model's weights while it trains.

    `ema` takes every step in, with a horizon of a twentieth of the steps and a shorter one at first; `swa`
    takes 50 points of the way, from three quarters on; `latest` the last five of such points. Floating
    buffers are averaged along, so that the average can be evaluated at any time; BatchNorm's are only near
    what the averaged weights need, so they are to be re-estimated at the end.

    Args:
        model: whose parameters and buffers are read, never kept.
        kind: `none`, `ema`, `swa` or `latest`.
        optimizer: one that evaluates other weights than it steps from has `train` and `eval`.
        modes: whether the optimizer does.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    >>> average = WeightAverage(model, "swa", torch.optim.SGD(model.parameters()), modes=False)
    >>> for step, value in enumerate([0.0, 1.0, 2.0, 4.0], start=1):
    ...     _ = model.weight.fill_(value)
    ...     average.update(step, total=4)
    >>> with average.applied():  # of the last two: from three quarters on
    ...     model.weight.item()
    3.0
    """

    def __init__(self, model: nn.Module, kind: str, optimizer: Optimizer, modes: bool) -> None:
        self.kind = kind
        self._modes = modes
        self._optimizer: Any = optimizer  # one with modes has methods that torch's class lacks
        self._own = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self._mean: list[Tensor] = []
        self._taken = 0
        self._points: list[list[Tensor]] = []
        if modes:
            self._optimizer.train()

    @property
    def differs(self) -> bool:
        """Tell whether the weights to evaluate are others than the model's now."""
        return self._modes or bool(self._mean)

    def update(self, done: int, total: int) -> None:
        """Take in the weights after `done` steps of `total`."""
        if self.kind == "ema":
            horizon = min(max(1.0, HORIZON * total), (10 + done) / 9)
            self._blend(1.0 / horizon)
        elif self.kind != "none" and done % max(1, total // POINTS) == 0:
            if self.kind == "swa" and done >= SWA_FROM * total:
                self._blend(1.0 / (self._taken + 1))
            elif self.kind == "latest":
                self._points = [*self._points, self._copies()][-LATEST:]
                self._mean = [sum(each[1:], each[0]) / len(each) for each in zip(*self._points, strict=True)]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the weights to evaluate while the context lasts."""
        before = self._copies() if self._mean else []
        if self._modes:
            self._optimizer.eval()
        self._set(self._mean)
        try:
            yield
        finally:
            self._set(before)
            if self._modes:
                self._optimizer.train()

    def copy_to_model(self) -> None:
        """Leave the weights to evaluate in the model."""
        if self._modes:
            self._optimizer.eval()
        self._set(self._mean)

    def reset(self) -> None:
        """Begin anew, after the weights went back to an earlier state."""
        self._mean, self._points, self._taken = [], [], 0

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on."""
        return {"mean": self._mean, "points": self._points, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean, self._taken = shard_tensors(state["mean"], self._own), state["taken"]
        self._points = [shard_tensors(point, self._own) for point in state["points"]]

    def _blend(self, share: float) -> None:
        self._taken += 1
        if not self._mean:
            self._mean = self._copies()
            return
        for mean, tensor in zip(self._mean, self._own, strict=True):
            mean.lerp_(tensor.detach(), share)

    def _copies(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._own]

    def _set(self, tensors: list[Tensor]) -> None:
        for own, tensor in zip(self._own, tensors, strict=bool(tensors)):
            own.detach().copy_(tensor)
