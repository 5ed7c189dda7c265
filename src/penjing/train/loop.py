"""The training loop: one page, every training method's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any

from penjing.core.errors import Refused
from penjing.core.task import Split
from penjing.train.depth import wrap_blocks
from penjing.train.distributed import RANK_SEED, Processes, find_processes
from penjing.train.feed import BatchFeed, LossMeter
from penjing.train.hooks import NO_HOOKS, Decision, Hooks, TrainingProgress
from penjing.train.numerics import numerics_for
from penjing.train.objective import Objective
from penjing.train.parameters import (
    BatchNormMode,
    is_batchnorm,
    keeps_statistics,
    make_optimizer,
    set_training_mode,
)
from penjing.train.saved_state import SavedState
from penjing.train.sharding import Sharded
from penjing.train.stepper import Stepper
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import nn

DEFAULT_BATCH = 128
PROBED_STEPS = 5
"""Steps whose times plan the rest where `max_seconds` limits it; the first is not counted."""

STATISTICS_EXAMPLES = 2_560
"""Examples that BatchNorm's statistics are estimated from after weights were averaged."""

RECENT = 50
RESERVE = 0.97

Covers = Callable[[str], bool]
Weights = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class FitResult:
    """What training did.

    Attributes:
        seconds: wall time of all of it; `data_seconds` of it went into waiting for batches.
        hook_seconds: of it went to the `evaluate` hook.
        steps: optimizer steps taken, of `planned_steps`.
        planned_epochs: length of the schedule in the end, where a limit shortened it.
        examples: examples seen, repeats counted.
        losses: mean objective of each epoch (the last may be a part).
        events: what happened that was not planned, and choices made, in words.
    """

    seconds: float
    data_seconds: float
    hook_seconds: float
    steps: int
    planned_steps: int
    planned_epochs: float
    examples: int
    losses: tuple[float, ...]
    events: tuple[str, ...]

    @property
    def samples_per_s(self) -> float:
        """Return examples per second of computing, without the time spent waiting for data."""
        return self.examples / max(self.seconds - self.data_seconds - self.hook_seconds, 1e-9)


def fit(
    model: nn.Module,
    split: Split,
    objective: Objective,
    strategy: Strategy,
    *,
    seed: int = 0,
    covers: Covers = lambda layer: True,
    hooks: Hooks = NO_HOOKS,
    saved_state: SavedState | None = None,
) -> FitResult:
    """Train a torch module in place by a strategy; the same seed gives the same weights.

    Weights that a mask removes stay zero. Modes, frozen flags and the caller's random state are put back.
    Only a limit in seconds that bites, a lack of memory, and `compile="auto"` make the result depend on the
    machine. With a saved state a run that was killed goes on from where it was saved last, to the same
    weights; the caller removes it when done.

    Args:
        model: trained in place.
        split: training data.
        objective: mean loss of a batch, to be minimized.
        strategy: length, optimizer, rate and all else.
        seed: of the order of examples, dropout and augmentation.
        covers: tells whether a layer of this name may train.
        hooks: called on the way (`penjing.train.hooks.Hooks` draws where).
        saved_state: file that the state is kept in on the way.

    Raises:
        Refused: all parameters are frozen, the split is empty, the loss diverges twice, memory lacks, or the
            saved state is another run's.

    >>> import numpy as np, torch
    >>> x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    >>> model = torch.nn.Linear(1, 1)
    >>> def squared_error(outputs, inputs, targets):
    ...     return (outputs - targets).square().mean()
    >>> done = fit(model, Split((x,), 2 * x, "train"), squared_error, Strategy(epochs=20, batch_size=16))
    >>> done.steps, abs(model.weight.item() - 2) < 0.1
    (80, True)
    """
    import torch

    size = min(strategy.batch_size or DEFAULT_BATCH, max(len(split), 1))
    norms = BatchNormMode(
        single_example=size == 1 and any(is_batchnorm(module) for module in model.modules()),
        frozen=strategy.batchnorm == "frozen",
        ghost=strategy.ghost_batch,
    )
    processes = find_processes()
    if processes.world_size > 1 and strategy.stochastic_depth:
        raise Refused(
            "cannot be used on several processes",
            value=f"{processes.world_size} processes",
            place="stochastic_depth",
            fix="leave it out",
        )
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        parameters = stack.enter_context(set_training_mode(model, covers, norms))
        numerics = numerics_for(model, strategy.precision, strategy.layout)
        stack.enter_context(numerics.applied(model))
        stack.enter_context(wrap_blocks(model, split.example(), strategy))
        torch.manual_seed(seed + RANK_SEED * processes.rank)
        with _sharded(model, parameters, strategy, processes) as (trained, parameters, processes, whole):
            optimizer = make_optimizer(trained, parameters, strategy)
            stepper = Stepper(trained, objective, strategy, numerics, optimizer, hooks, processes)
            weights = stepper.average.applied
            weights = weights if whole is None else partial(whole.evaluated_weights, weights)
            feed = BatchFeed(split, size, seed, processes.world_size)
            loop = _Loop(stepper, feed, strategy, hooks, saved_state, weights, processes)
            loop.run(partial(processes.broadcast_buffers, trained))
            average_kept = stepper.average.differs and not loop.kept_evaluated
            stepper.average.copy_to_model()
    events = [f"computed in {numerics}", *_describe(processes, norms)]
    if average_kept:
        events += _estimate_statistics(model, split, size, seed, norms, covers)
    return loop.result(events)


@contextmanager
def _sharded(
    model: nn.Module, parameters: list[nn.Parameter], strategy: Strategy, processes: Processes
) -> Iterator[tuple[nn.Module, list[nn.Parameter], Processes, Sharded | None]]:
    """Yield what trains: the model itself, or a sharded copy, which is copied to the model afterwards."""
    if not strategy.shard or processes.world_size == 1:
        yield model, parameters, processes, None
        return
    sharded = Sharded(model, strategy, processes.world_size)
    trained = sharded.module
    own = [p for p in trained.parameters() if p.requires_grad]
    yield trained, own, replace(processes, sharded=True), sharded
    sharded.copy_to_model()


def _describe(processes: Processes, norms: BatchNormMode) -> Iterator[str]:
    if processes.world_size > 1:
        yield f"{processes.world_size} processes, each with its part of every batch"
    if processes.sharded:
        yield "each process holds a shard of the weights, the gradients and the optimizer's state"
    if norms.single_example:
        yield "batches of one example: BatchNorm keeps its statistics"


def _estimate_statistics(
    model: nn.Module, split: Split, size: int, seed: int, norms: BatchNormMode, covers: Covers
) -> list[str]:
    """Estimate BatchNorm's statistics for weights that no step was taken with."""
    from penjing.backends.torch.observe.batch_statistics import find_tracked_batchnorms, reestimate

    found = find_tracked_batchnorms(model).items()
    layers = {name: module for name, module in found if not keeps_statistics(module, covers(name))}
    if not layers or norms.single_example or norms.frozen:
        return []
    batches = islice(split.batches(max(size, 2), seed), math.ceil(STATISTICS_EXAMPLES / size))
    reestimate(model, layers, (inputs for inputs, targets in batches if len(targets) > 1))
    return ["BatchNorm statistics estimated for the averaged weights"]


class _Loop:
    """One run of the loop: counts, times, and what a saved state holds."""

    def __init__(
        self,
        stepper: Stepper,
        feed: BatchFeed,
        strategy: Strategy,
        hooks: Hooks,
        saved_state: SavedState | None,
        weights: Weights,
        processes: Processes,
    ) -> None:
        self._stepper, self._feed, self._strategy, self._weights = stepper, feed, strategy, weights
        self._hooks, self._saved_state, self._processes = hooks, saved_state, processes
        self._meter = LossMeter(hooks.log, strategy.epochs)
        self._planned = self._total = max(1, math.ceil(strategy.epochs * feed.batches_per_epoch))
        self._done, self._seconds_before, self._hook_seconds = 0, 0.0, 0.0
        self._times: list[float] = []
        self._start = time.perf_counter()
        self._events: list[str] = []
        self.kept_evaluated = False

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start

    def run(self, broadcast_buffers: Callable[[], None]) -> None:
        """Take all steps.

        Args:
            broadcast_buffers: makes the buffers of all processes the same.
        """
        broadcast = self._processes.broadcast
        if self._saved_state is not None and (state := self._saved_state.load()) is not None:
            self._restore(state)
        every = self._hooks.evaluate_every * self._feed.batches_per_epoch
        if self._done >= self._total:
            return
        for epoch, (inputs, targets) in self._feed.iterate(self._done):
            began = time.perf_counter()
            loss = self._stepper.step(self._done, self._total, inputs, targets)
            self._done += 1
            self._meter.add(epoch, loss, len(targets))
            self._time_step(time.perf_counter() - began)
            over = self._done >= self._total
            if over:
                self._stepper.check_weights(self._done)
            if over or self._done // every > (self._done - 1) // every:
                broadcast_buffers()
                over = self._apply(broadcast(self._evaluate())) or over
            if over:
                break
            if self._saved_state is not None and self._saved_state.is_due(self._done):
                self._saved_state.save(self._state())
        self._meter.close()

    def _time_step(self, seconds: float) -> None:
        """Note how long a step took, and shorten the schedule where a limit asks for it."""
        self._times.append(seconds + self._feed.last_wait)
        self._stepper.forward.record_step(seconds, self._total - self._done)
        limit = self._strategy.max_seconds
        if limit is not None and self._done % PROBED_STEPS == 0:
            each = median(self._times[1:][-RECENT:]) + self._hook_seconds / self._done
            steps = fit_steps(self._total, self._done, each, limit - self._seconds)
            self._total = self._processes.broadcast(steps)

    def result(self, events: list[str]) -> FitResult:
        """Return what happened, with events known before."""
        shortened = self._total < self._planned and self._done >= self._total
        limit = f"{self._strategy.max_seconds or 0:g} s allow {self._total} of {self._planned} steps"
        return FitResult(
            seconds=self._seconds,
            data_seconds=self._feed.wait_seconds,
            hook_seconds=self._hook_seconds,
            steps=self._done,
            planned_steps=self._planned,
            planned_epochs=self._total / max(1, self._feed.batches_per_epoch),
            examples=self._meter.examples,
            losses=tuple(self._meter.losses),
            events=(
                *events,
                *[f"{limit}: schedule shortened to fit"] * shortened,
                *self._feed.events,
                *self._stepper.forward.events,
                *self._stepper.events,
                *self._events,
            ),
        )

    def _evaluate(self) -> Decision:
        """Call the `evaluate` hook."""
        began = time.perf_counter()
        decision = self._hooks.evaluate(
            TrainingProgress(
                epoch=self._done / self._feed.batches_per_epoch,
                step=self._done,
                total_steps=self._total,
                loss=self._meter.mean,
                seconds=self._seconds - self._hook_seconds,
                evaluated_weights=self._weights,
            )
        )
        self._hook_seconds += time.perf_counter() - began
        return decision

    def _apply(self, decision: Decision) -> bool:
        """Do what was decided, and tell whether training ends."""
        if decision.lr_factor != 1.0:
            self._stepper.scale_lr(decision.lr_factor)
        if decision.reason:
            self._events.append(f"step {self._done}: {decision.reason}")
        self.kept_evaluated = decision.stop and decision.keep_evaluated
        return decision.stop

    def _state(self) -> dict[str, Any]:
        import torch

        counts = [self._done, self._total, self._seconds, self._hook_seconds, self._feed.wait_seconds]
        return {
            "counts": counts,
            "times": self._times[1:][-RECENT:],
            "stepper": self._stepper.state(),
            "meter": self._meter.state(),
            "events": [self._events, self._feed.events],
            "random": self._processes.gather(torch.get_rng_state()),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        import torch

        if len(state["random"]) != self._processes.world_size:
            raise Refused(
                "needs as many processes as the run began with",
                place="training",
                value=f"{self._processes.world_size} for {len(state['random'])}",
                fix="launch as many, or give another folder",
            )
        self._done, self._total, self._seconds_before, self._hook_seconds, waited = state["counts"]
        self._feed.wait_seconds = waited
        self._times = [0.0, *state["times"]]
        self._stepper.restore(state["stepper"])
        self._meter.restore(state["meter"])
        self._events[:], self._feed.events[:] = state["events"]
        self._events.append(f"step {self._done}: went on from a saved state")
        torch.set_rng_state(state["random"][self._processes.rank])


def fit_steps(total: int, done: int, seconds_per_step: float, left: float) -> int:
    """Return how many steps in all fit into the seconds that are left: `total`, or fewer.

    At least `done`; a small reserve is kept, and nothing changes unless the limit is really missed.

    >>> fit_steps(100, 10, 1.0, left=90.0), fit_steps(100, 10, 1.0, left=50.0)
    (100, 58)
    """
    if (total - done) * seconds_per_step <= left:
        return total
    return min(total, done + max(0, int(RESERVE * left / seconds_per_step)))
