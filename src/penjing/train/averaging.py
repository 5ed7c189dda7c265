"""Averages of the weights on the way, and the weights that a model is judged by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from penjing.train.sharding import spread_all

HORIZON = 0.05
"""Share of the training that an exponential average looks back over."""

SWA_FROM = 0.75
"""Share of the way from which on `swa` averages."""

POINTS = 50
"""Points of the whole way at which `swa` and `latest` take the weights."""

LATEST = 5
"""Points that `latest` averages over."""


class Average:
    """Keeps an average of a model's weights while it trains.

    `ema` takes every step in, with a horizon of a twentieth of the steps and a shorter one at first; `swa`
    takes 50 points of the way, from three quarters on; `latest` the last five of such points. Floating
    buffers are averaged along, so that the average can be judged at any time; BatchNorm's are only near what
    the averaged weights need, so they are to be estimated anew at the end.

    Args:
        model: whose parameters and buffers are read, never kept.
        kind: `none`, `ema`, `swa` or `latest`.
        optimizer: one that judges by other weights than it steps from has `train` and `eval`.
        modes: whether the optimizer does.
    """

    def __init__(self, model: Any, kind: str, optimizer: Any, modes: bool) -> None:
        self.kind = kind
        self._optimizer, self._modes = optimizer, modes
        self._own = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self._mean: list[Any] = []
        self._taken = 0
        self._points: list[list[Any]] = []
        if modes:
            optimizer.train()

    @property
    def other(self) -> bool:
        """Tell whether the weights to be judged by are others than the model's now."""
        return self._modes or bool(self._mean)

    def stepped(self, done: int, total: int) -> None:
        """Take in the weights after `done` steps of `total`."""
        if self.kind == "ema":
            horizon = min(max(1.0, HORIZON * total), (10 + done) / 9)
            self._blend(1.0 / horizon)
        elif self.kind != "none" and done % max(1, total // POINTS) == 0:
            if self.kind == "swa" and done >= SWA_FROM * total:
                self._blend(1.0 / (self._taken + 1))
            elif self.kind == "latest":
                self._points = [*self._points, self._copies()][-LATEST:]
                self._mean = [sum(parts) / len(parts) for parts in zip(*self._points, strict=True)]

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model have the weights to be judged by while the context lasts."""
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

    def keep(self) -> None:
        """Leave the weights to be judged by in the model."""
        if self._modes:
            self._optimizer.eval()
        self._set(self._mean)

    def forget(self) -> None:
        """Begin anew, after the weights went back to an earlier state."""
        self._mean, self._points, self._taken = [], [], 0

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on."""
        return {"mean": self._mean, "points": self._points, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean, self._taken = spread_all(state["mean"], self._own), state["taken"]
        self._points = [spread_all(point, self._own) for point in state["points"]]

    def _blend(self, share: float) -> None:
        self._taken += 1
        if not self._mean:
            self._mean = self._copies()
            return
        for mean, tensor in zip(self._mean, self._own, strict=True):
            mean.lerp_(tensor.detach(), share)

    def _copies(self) -> list[Any]:
        return [tensor.detach().clone() for tensor in self._own]

    def _set(self, tensors: list[Any]) -> None:
        for own, tensor in zip(self._own, tensors, strict=bool(tensors)):
            own.detach().copy_(tensor)
