"""One optimizer step that survives a lack of memory and never leaves broken weights behind."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.train.hooks import NO_HOOKS, Hooks
from penjing.train.numerics import Numerics
from penjing.train.objective import Objective, Tensors, tensors_of
from penjing.train.schedule import rate_factor
from penjing.train.strategy import Strategy

SNAPSHOT_EVERY = 50
"""Steps between copies of the weights to fall back to; a copy costs far less than a step."""

SMALLEST_PART = 4
"""Examples in the smallest part of a halved batch; parts of one have no batch statistics."""

EXPLODED = 1e4
"""A loss this many times the first one is divergence, though finite."""

RATE_CUT = 0.1


class Stepper:
    """Steps on one model, with what must be remembered between steps."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        strategy: Strategy,
        numerics: Numerics,
        optimizer: Any,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        from penjing.backends.torch.masks import enforce

        self.events: list[str] = []
        self._model, self._objective, self._strategy = model, objective, strategy
        self._numerics, self._optimizer, self._hooks = numerics, optimizer, hooks
        self._enforce = partial(enforce, model, optimizer)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._kept = [*model.parameters(), *model.buffers()]
        self._snapshot = (0, self._copies())
        self._cut = 1.0
        self._part: int | None = None
        self._limit = math.inf

    def step(self, number: int, total: int, inputs: Arrays, targets: Any) -> float | None:
        """Take step `number` of `total` at its rate; return the loss, or None if it diverged.

        After a first divergence the weights of the last snapshot are back, the rate is a tenth, and
        training goes on with the next batch.

        Raises:
            Refused: a second divergence, or no memory for parts of four examples.
        """
        x = self._numerics.lay_out(tensors_of(inputs, self._parameters[0]))
        y = tensors_of((targets,), self._parameters[0])[0]
        loss, norm = self._gradients(x, y, number / total)
        if not (math.isfinite(loss) and math.isfinite(norm) and loss <= self._limit):
            self._fall_back(number, f"loss {loss:.3g}, gradient norm {norm:.3g}", inputs)
            return None
        if self._limit == math.inf:
            self._limit = EXPLODED * max(loss, 1.0)
        if number and number % SNAPSHOT_EVERY == 0:
            self._snapshot = (number, self._copies())
        for group in self._optimizer.param_groups:
            group["lr"] = (
                self._strategy.rate * rate_factor(self._strategy.schedule, number, total) * self._cut
            )
        self._optimizer.step()
        self._enforce()
        self._hooks.stepped(number / total)
        return loss

    def finish(self, number: int) -> None:
        """Make sure that the last step left finite weights, or go back to the last that were."""
        import torch

        if not all(bool(torch.isfinite(t).all()) for t in self._kept if t.is_floating_point()):
            self._fall_back(number, "weights that are not finite", ())

    def _copies(self) -> list[Any]:
        return [tensor.detach().clone() for tensor in self._kept]

    def _gradients(self, x: Tensors, y: Any, progress: float) -> tuple[float, float]:
        import torch

        while True:
            try:
                self._optimizer.zero_grad(set_to_none=True)
                loss = self._accumulate(x, y)
                self._hooks.gradients(progress)
                self._enforce()
                norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._strategy.clip_norm or math.inf)
                return loss, float(norm)
            except (MemoryError, RuntimeError) as error:
                if not _lacks_memory(error):
                    raise
                self._halve(len(y), error)

    def _accumulate(self, x: Tensors, y: Any) -> float:
        total = len(y)
        count = 1 if self._part is None else math.ceil(total / self._part)
        parts = [t.tensor_split(count) for t in (*x, y)]
        mean = 0.0
        for *inputs, targets in zip(*parts, strict=True):
            with self._numerics.autocast():
                loss = self._objective(self._model(*inputs), tuple(inputs), targets)
            loss = loss * (len(targets) / total)
            loss.backward()
            mean += float(loss.detach())
        return mean

    def _halve(self, size: int, error: Exception) -> None:
        part = (min(size, self._part or size) + 1) // 2
        if part < SMALLEST_PART:
            raise Refused("a training step fits in memory", value=f"{self._part or size} examples do not",
                          place="training", fix="free memory or use a smaller model", code=Exit.ENVIRONMENT,
                          ) from error  # fmt: skip
        self._part = part
        self.events.append(f"out of memory: batches are summed from parts of {part} examples")

    def _fall_back(self, number: int, found: str, inputs: Arrays) -> None:
        import torch

        step, tensors = self._snapshot
        with torch.no_grad():
            for tensor, saved in zip(self._kept, tensors, strict=True):
                tensor.copy_(saved)
        self._enforce()
        bad = "" if all(_finite(x) for x in inputs) else "; the batch itself holds NaN or Inf"
        if self._cut < 1.0:
            raise Refused("the loss stays finite in training", value=f"{found} at step {number + 1}{bad}",
                          place=type(self._strategy).__name__,
                          fix=f"lower lr (now {self._strategy.rate:g}) or check the data")  # fmt: skip
        self._cut = RATE_CUT
        self._optimizer.state.clear()
        self.events.append(
            f"step {number + 1}: {found}{bad}; weights of step {step} restored, learning rate divided by 10"
        )


def _finite(array: Any) -> bool:
    import numpy as np

    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _lacks_memory(error: Exception) -> bool:
    import torch

    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in words for phrase in ("out of memory", "not enough memory", "can't allocate memory")
    )
