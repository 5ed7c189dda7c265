"""The training loop: one page, every training method's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

from penjing.core.errors import Refused
from penjing.core.task import Split
from penjing.train.depth import trained_by_blocks
from penjing.train.distributed import RANK_SEED, Processes, processes
from penjing.train.feed import Feed, Tally
from penjing.train.hooks import NO_HOOKS, Hooks, Moment, Reaction
from penjing.train.numerics import numerics_for
from penjing.train.objective import Objective
from penjing.train.parameters import BatchNorms, is_batchnorm, keeps_statistics, make_optimizer, training_mode
from penjing.train.saved_state import Checkpoint
from penjing.train.sharding import Sharded
from penjing.train.stepper import Stepper
from penjing.train.strategy import Strategy

DEFAULT_BATCH = 128
PROBED_STEPS = 5
"""Steps whose times plan the rest where `max_seconds` limits it; the first is not counted."""

STATISTICS_EXAMPLES = 2_560
"""Examples that BatchNorm's statistics are estimated from after weights were averaged."""

RECENT = 50
RESERVE = 0.97


@dataclass(frozen=True)
class Fit:
    """What training did.

    Attributes:
        seconds: wall time of all of it; `data_seconds` of it went into waiting for batches.
        hook_seconds: of it went to the caller's hook after each pass.
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
    model: Any,
    split: Split,
    objective: Objective,
    strategy: Strategy,
    *,
    seed: int = 0,
    covers: Callable[[str], bool] = lambda layer: True,
    hooks: Hooks = NO_HOOKS,
    checkpoint: Checkpoint | None = None,
) -> Fit:
    """Train a torch module in place by a strategy; the same seed gives the same weights.

    Weights that a mask removes stay zero.

    Modes, frozen flags and the caller's random state are put back. Only a limit in seconds that bites, a
    lack of memory, and `compile="auto"` make the result depend on the machine. With a checkpoint a run that
    was killed goes on from where it was saved last, to the same weights; the caller removes it when done.

    Raises:
        Refused: all parameters are frozen, the split is empty, the loss diverges twice, memory lacks, or the
            checkpoint is another run's.
    """
    import torch

    size = min(strategy.batch_size or DEFAULT_BATCH, max(len(split), 1))
    numerics = numerics_for(model, strategy.precision, strategy.layout)
    norms = BatchNorms(
        alone=size == 1 and any(is_batchnorm(module) for module in model.modules()),
        frozen=strategy.batchnorm == "frozen",
        ghost=strategy.ghost_batch,
    )
    together = processes()
    if together.count > 1 and strategy.stochastic_depth:
        raise Refused(
            "blocks are left out on one process only",
            value=f"{together.count} processes",
            place="stochastic_depth",
            fix="leave it out",
        )
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with (
        torch.random.fork_rng(devices=devices),
        training_mode(model, covers, norms) as parameters,
        numerics.applied(model),
        trained_by_blocks(model, split.example(), strategy),
    ):
        torch.manual_seed(seed + RANK_SEED * together.rank)
        sharded = Sharded(model, strategy, together.count) if strategy.shard and together.count > 1 else None
        trained = model
        if sharded is not None:
            trained, together = sharded.module, replace(together, sharded=True)
            parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = make_optimizer(trained, parameters, strategy)
        stepper = Stepper(trained, objective, strategy, numerics, optimizer, hooks, together)
        shown = stepper.average.shown
        shown = shown if sharded is None else partial(sharded.shown, shown)
        run = _Run(
            stepper, Feed(split, size, seed, together.count), strategy, hooks, checkpoint, shown, together
        )
        run.go(partial(together.share_buffers, trained))
        average_kept = stepper.average.other and not run.as_shown
        stepper.average.keep()
        if sharded is not None:
            sharded.give_back()
    events = [f"computed in {numerics}"]
    if together.count > 1:
        events.append(f"{together.count} processes, each with its part of every batch")
    if together.sharded:
        events.append("each process holds a part of the weights, the gradients and the optimizer's state")
    if norms.alone:
        events.append("batches of one example: BatchNorm keeps its statistics")
    if average_kept:
        events += _statistics_for_average(model, split, size, seed, norms, covers)
    return run.result(events)


def _statistics_for_average(
    model: Any, split: Split, size: int, seed: int, norms: BatchNorms, covers: Callable[[str], bool]
) -> list[str]:
    """Estimate BatchNorm's statistics for weights that no step was taken with."""
    from penjing.backends.torch.observe.batch_statistics import find_tracked_batchnorms, reestimate

    found = find_tracked_batchnorms(model).items()
    layers = {name: module for name, module in found if not keeps_statistics(module, covers(name))}
    if not layers or norms.alone or norms.frozen:
        return []
    batches = islice(split.batches(max(size, 2), seed), math.ceil(STATISTICS_EXAMPLES / size))
    reestimate(model, layers, (inputs for inputs, targets in batches if len(targets) > 1))
    return ["BatchNorm statistics estimated for the averaged weights"]


class _Run:
    """One run of the loop: counts, times, and what a checkpoint holds."""

    def __init__(
        self,
        stepper: Stepper,
        feed: Feed,
        strategy: Strategy,
        hooks: Hooks,
        checkpoint: Checkpoint | None,
        shown: Callable[[], AbstractContextManager[None]],
        together: Processes,
    ) -> None:
        self._stepper, self._feed, self._strategy, self._shown = stepper, feed, strategy, shown
        self._hooks, self._checkpoint, self._together = hooks, checkpoint, together
        self._tally = Tally(hooks.say, strategy.epochs)
        self._planned = self._total = max(1, math.ceil(strategy.epochs * feed.batches_an_epoch))
        self._done, self._seconds_before, self._hooked = 0, 0.0, 0.0
        self._times: list[float] = []
        self._start = time.perf_counter()
        self._events: list[str] = []
        self.as_shown = False

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start

    def go(self, share: Callable[[], None]) -> None:
        """Take all steps.

        Args:
            share: makes the buffers of all processes the same.
        """
        agreed = self._together.agreed
        if self._checkpoint is not None and (state := self._checkpoint.load()) is not None:
            self._restore(state)
        limit, every = self._strategy.max_seconds, self._hooks.every * self._feed.batches_an_epoch
        if self._done >= self._total:
            return
        for epoch, (inputs, targets) in self._feed.walk(self._done):
            began = time.perf_counter()
            loss = self._stepper.step(self._done, self._total, inputs, targets)
            self._done += 1
            self._tally.add(epoch, loss, len(targets))
            took = time.perf_counter() - began
            self._times.append(took + self._feed.last_wait)
            self._stepper.forward.stepped(took, self._total - self._done)
            if limit is not None and self._done % PROBED_STEPS == 0:
                each = median(self._times[1:][-RECENT:]) + self._hooked / self._done
                left = limit - self._seconds
                self._total = agreed(steps_within(self._total, self._done, each, left))
            over = self._done >= self._total
            if over:
                self._stepper.finish(self._done)
            if over or self._done // every > (self._done - 1) // every:
                share()
                over = self._reacted(agreed(self._asked())) or over
            if over:
                break
            if self._checkpoint is not None and self._checkpoint.due(self._done):
                self._checkpoint.save(self._state())
        self._tally.close()

    def result(self, events: list[str]) -> Fit:
        """Return what happened, with events known before."""
        shortened = self._total < self._planned and self._done >= self._total
        limit = f"{self._strategy.max_seconds or 0:g} s allow {self._total} of {self._planned} steps"
        return Fit(
            seconds=self._seconds,
            data_seconds=self._feed.waited,
            hook_seconds=self._hooked,
            steps=self._done,
            planned_steps=self._planned,
            planned_epochs=self._total / max(1, self._feed.batches_an_epoch),
            examples=self._tally.examples,
            losses=tuple(self._tally.losses),
            events=(
                *events,
                *[f"{limit}: schedule shortened to fit"] * shortened,
                *self._feed.events,
                *self._stepper.forward.events,
                *self._stepper.events,
                *self._events,
            ),
        )

    def _asked(self) -> Reaction:
        """Let the caller look."""
        began = time.perf_counter()
        moment = Moment(
            epoch=self._done / self._feed.batches_an_epoch,
            step=self._done,
            total=self._total,
            loss=self._tally.mean,
            seconds=self._seconds - self._hooked,
            shown=self._shown,
        )
        reaction = self._hooks.passed(moment)
        self._hooked += time.perf_counter() - began
        return reaction

    def _reacted(self, reaction: Reaction) -> bool:
        """Do what was answered, and tell whether training ends."""
        if reaction.slow != 1.0:
            self._stepper.scale(reaction.slow)
        if reaction.reason:
            self._events.append(f"step {self._done}: {reaction.reason}")
        self.as_shown = reaction.stop and reaction.as_shown
        return reaction.stop

    def _state(self) -> dict[str, Any]:
        import torch

        return {
            "counts": [self._done, self._total, self._seconds, self._hooked, self._feed.waited],
            "times": self._times[1:][-RECENT:],
            "stepper": self._stepper.state(),
            "tally": self._tally.state(),
            "events": [self._events, self._feed.events],
            "random": self._together.gathered(torch.get_rng_state()),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        import torch

        if len(state["random"]) != self._together.count:
            raise Refused(
                "a run goes on with as many processes as it began with",
                place="training",
                value=f"{self._together.count}, began with {len(state['random'])}",
                fix="launch as many, or give another folder",
            )
        self._done, self._total, self._seconds_before, self._hooked, self._feed.waited = state["counts"]
        self._times = [0.0, *state["times"]]
        self._stepper.restore(state["stepper"])
        self._tally.restore(state["tally"])
        self._events[:], self._feed.events[:] = state["events"]
        self._events.append(f"step {self._done}: went on from a saved state")
        torch.set_rng_state(state["random"][self._together.rank])


def steps_within(total: int, done: int, seconds_a_step: float, left: float) -> int:
    """Return how many steps in all fit into the seconds that are left: `total`, or fewer.

    At least `done`; a small reserve is kept, and nothing changes unless the limit is really missed.
    """
    if (total - done) * seconds_a_step <= left:
        return total
    return min(total, done + max(0, int(RESERVE * left / seconds_a_step)))
