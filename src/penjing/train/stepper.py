"""One optimizer step that survives a lack of memory and never leaves broken weights behind."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from penjing.core.backend import Arrays
from penjing.core.errors import Refused
from penjing.train.augment import Blend, augmented
from penjing.train.averaging import Average
from penjing.train.compiling import Forward, unfit
from penjing.train.distributed import ALONE, Processes
from penjing.train.hooks import NO_HOOKS, Hooks
from penjing.train.micro_batches import Parts, free_memory
from penjing.train.numerics import Numerics
from penjing.train.objective import Objective, tensors_of
from penjing.train.optimizers import KINDS
from penjing.train.parameters import statistics_kept
from penjing.train.schedule import rate_factor
from penjing.train.sharding import spread, spread_all, whole
from penjing.train.strategy import Strategy

SNAPSHOT_EVERY = 50
"""Steps between copies of the weights to fall back to; a copy costs far less than a step."""

EXPLODED = 1e4
"""A loss this many times the first one is divergence, though finite."""

RATE_CUT = 0.1


class Stepper:
    """Steps on one model, with what must be remembered between steps.

    Attributes:
        events: what happened that was not planned, in words.
        average: of the weights on the way.
        forward: the call of the model, which may be compiled.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        strategy: Strategy,
        numerics: Numerics,
        optimizer: Any,
        hooks: Hooks = NO_HOOKS,
        processes: Processes = ALONE,
    ) -> None:
        from penjing.backends.torch.masks import enforce_masks

        self.events: list[str] = []
        self.average = Average(model, strategy.averaging, optimizer, KINDS[strategy.optimizer].modes)
        self._model, self._objective, self._strategy = model, objective, strategy
        self._processes = processes
        self.forward = Forward(
            processes.wrapped(model), strategy.compile, unfit(strategy, model, processes.count)
        )
        self._numerics, self._optimizer, self._hooks = numerics, optimizer, hooks
        self._enforce = partial(enforce_masks, model, optimizer)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._kept = [*model.parameters(), *model.buffers()]
        self._snapshot = (0, self._copies())
        self._cut = self._scale = 1.0
        self._parts = Parts(strategy.parts, partial(free_memory, numerics.device), self.events)
        self._share = 1.0
        self._limit = math.inf

    def step(self, number: int, total: int, inputs: Arrays, targets: Any) -> float | None:
        """Take step `number` of `total` at its rate; return the loss, or None if it diverged.

        After a first divergence the weights of the last snapshot are back, the rate is a tenth, and
        training goes on with the next batch.

        Raises:
            Refused: a second divergence, or no memory for parts of four examples.
        """
        progress = number / total
        *x, y = self._processes.part(tensors_of((*inputs, targets), self._parameters[0]))
        batch = augmented(self._strategy, tuple(x), y, progress)
        batch = replace(batch, inputs=self._numerics.lay_out(batch.inputs))
        self._parts.look(number, len(y))
        self._share = len(y) * self._processes.count / len(targets)
        loss, norm = self._gradients(batch, number, progress)
        if not (math.isfinite(loss) and math.isfinite(norm) and loss <= self._limit):
            self._fall_back(number, f"loss {loss:.3g}, gradient norm {norm:.3g}", inputs)
            return None
        if self._limit == math.inf:
            self._limit = EXPLODED * max(loss, 1.0)
        if number and number % SNAPSHOT_EVERY == 0:
            self._snapshot = (number, self._copies())
        if self._strategy.sam is not None:
            self._sharpen(batch, number, progress, norm)
        rate = self.rate(number, total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self._optimizer.step()
        self._enforce()
        if self._processes.sharded:
            self._processes.share_buffers(self._model)
        self.average.stepped(number + 1, total)
        self._hooks.stepped(progress)
        return loss

    def rate(self, number: int, total: int) -> float:
        """Return the learning rate of a step."""
        factor = rate_factor(self._strategy.decline, number, total, self._strategy.warmup)
        return self._strategy.rate * factor * self._cut * self._scale

    def scale(self, factor: float) -> None:
        """Multiply the rate of all steps to come by a factor above 0."""
        self._scale *= factor

    def finish(self, number: int) -> None:
        """Make sure that the last step left finite weights, or go back to the last that were."""
        import torch

        floats = (t for t in self._kept if t.is_floating_point())
        if not all(bool(whole(torch.isfinite(t).all())) for t in floats):
            self._fall_back(number, "weights that are not finite", ())

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs to take the next step as if nothing had happened."""
        step, tensors = self._snapshot
        return {
            "weights": [tensor.detach() for tensor in self._kept],
            "optimizer": self._optimizer.state_dict(),
            "average": self.average.state(),
            "snapshot": [step, tensors],
            "numbers": [self._cut, self._scale, self._limit],
            "parts": self._parts.state(),
            "events": self.events,
            "forward": self.forward.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same model and strategy."""
        self._put(spread_all(state["weights"], self._kept))
        self._optimizer.load_state_dict(self._in_parts(state["optimizer"]))
        self.average.restore(state["average"])
        step, tensors = state["snapshot"]
        self._snapshot = (step, spread_all(tensors, self._kept))
        self._cut, self._scale, self._limit = state["numbers"]
        self._parts.restore(state["parts"])
        self.events[:] = state["events"]
        self.forward.restore(state["forward"])

    def _copies(self) -> list[Any]:
        return [tensor.detach().clone() for tensor in self._kept]

    def _put(self, tensors: list[Any]) -> None:
        for tensor, saved in zip(self._kept, tensors, strict=True):
            tensor.detach().copy_(saved)

    def _in_parts(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state with what belongs to a parameter in the parts that it is in."""
        found = {
            index: {k: spread(v, p) if getattr(v, "shape", None) == p.shape else v for k, v in of.items()}
            for index, p in enumerate(self._parameters)
            if (of := state["state"].get(index)) is not None
        }
        return state | {"state": found}

    def _gradients(self, batch: Blend, number: int, progress: float) -> tuple[float, float]:
        import torch

        while True:
            try:
                self._optimizer.zero_grad(set_to_none=True)
                loss = self._accumulate(batch)
                self._hooks.gradients(progress)
                self._enforce()
                norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._strategy.clip_norm or math.inf)
                return self._processes.summed(loss / self._processes.count), float(whole(norm))
            except (MemoryError, RuntimeError) as error:
                if not _lacks_memory(error) or self._processes.count > 1:
                    raise
                self._parts.halve(number, len(batch.targets), error)

    def _accumulate(self, batch: Blend) -> float:
        total = len(batch.targets)
        count = self._parts.count(total)
        tensors = (*batch.inputs, batch.targets, *(() if batch.others is None else (batch.others,)))
        mean = 0.0
        for parts in zip(*(t.tensor_split(count) for t in tensors), strict=True):
            inputs, targets = parts[: len(batch.inputs)], parts[len(batch.inputs) :]
            with self._numerics.autocast():
                outputs = self.forward(*inputs)
                loss = self._objective(outputs, inputs, targets[0])
                if batch.others is not None:
                    other = self._objective(outputs, inputs, targets[1])
                    loss = batch.share * loss + (1 - batch.share) * other
            loss = loss * (self._share * len(targets[0]) / total)
            loss.backward()
            mean += float(loss.detach())
        return mean

    def _sharpen(self, batch: Blend, number: int, progress: float, norm: float) -> None:
        """Take the gradients a step uphill instead (Foret et al. 2021, "SAM"); statistics stay."""
        import torch

        held = min(norm, self._strategy.clip_norm or math.inf)
        scale = (self._strategy.sam or 0.0) / max(held, 1e-12)
        trained = [p for p in self._parameters if p.grad is not None]
        with torch.no_grad():
            before = [p.detach().clone() for p in trained]
            for parameter in trained:
                parameter.add_(parameter.grad, alpha=scale)
        try:
            with statistics_kept(self._model):
                self._gradients(batch, number, progress)
        finally:
            for parameter, saved in zip(trained, before, strict=True):
                parameter.detach().copy_(saved)

    def _fall_back(self, number: int, found: str, inputs: Arrays) -> None:
        step, tensors = self._snapshot
        self._put(tensors)
        self.average.forget()
        self._enforce()
        bad = "" if all(_finite(x) for x in inputs) else "; the batch itself holds NaN or Inf"
        if self._cut < 1.0:
            raise Refused(
                "the loss stays finite in training",
                value=f"{found} at step {number + 1}{bad}",
                place=type(self._strategy).__name__,
                fix=f"lower lr (now {self._strategy.rate:g}) or check the data",
            )
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
