"""One optimizer step that survives a lack of memory and never leaves broken weights behind."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from penjing.core.backend import Arrays
from penjing.core.errors import Refused
from penjing.train.augment import MixedBatch, augment
from penjing.train.averaging import WeightAverage
from penjing.train.compiling import Forward, find_obstacle
from penjing.train.distributed import ONE_PROCESS, Processes
from penjing.train.hooks import NO_HOOKS, Hooks
from penjing.train.micro_batches import MicroBatches, free_memory
from penjing.train.numerics import Numerics
from penjing.train.objective import Objective, to_tensors
from penjing.train.optimizers import OPTIMIZERS
from penjing.train.parameters import keep_statistics
from penjing.train.schedule import lr_factor
from penjing.train.sharding import gather_tensor, shard_tensor, shard_tensors
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.optim import Optimizer

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
        model: nn.Module,
        objective: Objective,
        strategy: Strategy,
        numerics: Numerics,
        optimizer: Optimizer,
        hooks: Hooks = NO_HOOKS,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        from penjing.backends.torch.masks import enforce_masks

        self.events: list[str] = []
        modes = OPTIMIZERS[strategy.optimizer].modes
        self.average = WeightAverage(model, strategy.averaging, optimizer, modes)
        self._model, self._objective, self._strategy = model, objective, strategy
        self._processes = processes
        obstacle = find_obstacle(strategy, model, processes.world_size)
        self.forward = Forward(processes.wrap(model), strategy.compile, obstacle)
        self._numerics, self._optimizer, self._hooks = numerics, optimizer, hooks
        self._enforce = partial(enforce_masks, model, optimizer)
        self._parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self._kept: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._snapshot = (0, self._copies())
        self._cut = self._scale = 1.0
        free = partial(free_memory, numerics.device)
        self._micro_batches = MicroBatches(strategy.accumulation_steps, free, self.events)
        self._weight = 1.0
        self._limit = math.inf

    def step(self, number: int, total: int, inputs: Arrays, targets: NDArray[Any]) -> float | None:
        """Take step `number` of `total` at its rate; return the loss, or None if it diverged.

        After a first divergence the weights of the last snapshot are back, the rate is a tenth, and
        training goes on with the next batch.

        Raises:
            Refused: a second divergence, or no memory for micro-batches of four examples.
        """
        progress = number / total
        *x, y = self._processes.local_batch(to_tensors((*inputs, targets), self._parameters[0]))
        batch = augment(self._strategy, tuple(x), y, progress)
        batch = replace(batch, inputs=self._numerics.to_layout(batch.inputs))
        self._micro_batches.grow(number, len(y))
        self._weight = len(y) * self._processes.world_size / len(targets)
        loss, norm = self._compute_gradients(batch, number, progress)
        if not (math.isfinite(loss) and math.isfinite(norm) and loss <= self._limit):
            self._restore_snapshot(number, f"loss {loss:.3g}, gradient norm {norm:.3g}", inputs)
            return None
        if self._limit == math.inf:
            self._limit = EXPLODED * max(loss, 1.0)
        if number and number % SNAPSHOT_EVERY == 0:
            self._snapshot = (number, self._copies())
        if self._strategy.sam is not None:
            self._take_sharpness_aware_gradients(batch, number, progress, norm)
        rate = self.learning_rate(number, total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self._optimizer.step()
        self._enforce()
        if self._processes.sharded:
            self._processes.broadcast_buffers(self._model)
        self.average.update(number + 1, total)
        self._hooks.after_step(progress)
        return loss

    def learning_rate(self, number: int, total: int) -> float:
        """Return the learning rate of a step."""
        factor = lr_factor(self._strategy.lr_schedule, number, total, self._strategy.warmup)
        return self._strategy.peak_lr * factor * self._cut * self._scale

    def scale_lr(self, factor: float) -> None:
        """Multiply the rate of all steps to come by a factor above 0."""
        self._scale *= factor

    def check_weights(self, number: int) -> None:
        """Make sure that the last step left finite weights, or restore the last that were."""
        import torch

        floats = (t for t in self._kept if t.is_floating_point())
        if not all(bool(gather_tensor(torch.isfinite(t).all())) for t in floats):
            self._restore_snapshot(number, "weights that are not finite", ())

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs to take the next step as if nothing had happened."""
        step, tensors = self._snapshot
        return {
            "weights": [tensor.detach() for tensor in self._kept],
            "optimizer": self._optimizer.state_dict(),
            "average": self.average.state(),
            "snapshot": [step, tensors],
            "numbers": [self._cut, self._scale, self._limit],
            "micro_batches": self._micro_batches.state(),
            "events": self.events,
            "forward": self.forward.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same model and strategy."""
        self._put(shard_tensors(state["weights"], self._kept))
        self._optimizer.load_state_dict(self._sharded(state["optimizer"]))
        self.average.restore(state["average"])
        step, tensors = state["snapshot"]
        self._snapshot = (step, shard_tensors(tensors, self._kept))
        self._cut, self._scale, self._limit = state["numbers"]
        self._micro_batches.restore(state["micro_batches"])
        self.events[:] = state["events"]
        self.forward.restore(state["forward"])

    def _copies(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._kept]

    def _put(self, tensors: list[Tensor]) -> None:
        for tensor, saved in zip(self._kept, tensors, strict=True):
            tensor.detach().copy_(saved)

    def _sharded(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state with what belongs to a parameter sharded as it is."""

        def shard(value: Any, like: nn.Parameter) -> Any:
            return shard_tensor(value, like) if getattr(value, "shape", None) == like.shape else value

        found = {
            index: {name: shard(value, parameter) for name, value in kept.items()}
            for index, parameter in enumerate(self._parameters)
            if (kept := state["state"].get(index)) is not None
        }
        return state | {"state": found}

    def _compute_gradients(self, batch: MixedBatch, number: int, progress: float) -> tuple[float, float]:
        import torch

        largest = self._strategy.clip_norm or math.inf
        while True:
            try:
                self._optimizer.zero_grad(set_to_none=True)
                loss = self._accumulate(batch)
                self._hooks.after_backward(progress)
                self._enforce()
                norm = torch.nn.utils.clip_grad_norm_(self._parameters, largest)
                mean = self._processes.all_reduce(loss / self._processes.world_size)
                return mean, float(gather_tensor(norm))
            except (MemoryError, RuntimeError) as error:
                if not _lacks_memory(error) or self._processes.world_size > 1:
                    raise
                self._micro_batches.halve(number, len(batch.targets), error)

    def _accumulate(self, batch: MixedBatch) -> float:
        total = len(batch.targets)
        count = self._micro_batches.count(total)
        mixed = () if batch.other_targets is None else (batch.other_targets,)
        tensors = (*batch.inputs, batch.targets, *mixed)
        mean = 0.0
        for micro_batch in zip(*(t.tensor_split(count) for t in tensors), strict=True):
            inputs, targets = micro_batch[: len(batch.inputs)], micro_batch[len(batch.inputs) :]
            with self._numerics.autocast():
                outputs = self.forward(*inputs)
                loss = self._objective(outputs, inputs, targets[0])
                if mixed:
                    other = self._objective(outputs, inputs, targets[1])
                    loss = batch.weight * loss + (1 - batch.weight) * other
            loss = loss * (self._weight * len(targets[0]) / total)
            loss.backward()
            mean += float(loss.detach())
        return mean

    def _take_sharpness_aware_gradients(
        self, batch: MixedBatch, number: int, progress: float, norm: float
    ) -> None:
        """Take the gradients a step uphill instead (Foret et al. 2021, "SAM"); statistics stay."""
        import torch

        clipped = min(norm, self._strategy.clip_norm or math.inf)
        scale = (self._strategy.sam or 0.0) / max(clipped, 1e-12)
        moved = [p for p in self._parameters if p.grad is not None]
        with torch.no_grad():
            before = [p.detach().clone() for p in moved]
            for parameter in moved:
                parameter.add_(parameter.grad, alpha=scale)
        try:
            with keep_statistics(self._model):
                self._compute_gradients(batch, number, progress)
        finally:
            for parameter, saved in zip(moved, before, strict=True):
                parameter.detach().copy_(saved)

    def _restore_snapshot(self, number: int, found: str, inputs: Arrays) -> None:
        step, tensors = self._snapshot
        self._put(tensors)
        self.average.reset()
        self._enforce()
        bad = "" if all(_finite(x) for x in inputs) else "; the batch itself holds NaN or Inf"
        if self._cut < 1.0:
            raise Refused(
                "the loss must stay finite",
                value=f"{found} at step {number + 1}{bad}",
                place="training",
                fix=f"lower lr (now {self._strategy.peak_lr:g}) or check the data",
            )
        self._cut = RATE_CUT
        self._optimizer.state.clear()
        self.events.append(
            f"step {number + 1}: {found}{bad}; weights of step {step} restored, learning rate divided by 10"
        )


def _finite(array: NDArray[Any]) -> bool:
    import numpy as np

    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _lacks_memory(error: Exception) -> bool:
    import torch

    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in words for phrase in ("out of memory", "not enough memory", "can't allocate memory")
    )
