"""The training loop: one page, every training method's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from penjing.core.errors import Refused
from penjing.core.task import Batch, Split
from penjing.train.hooks import NO_HOOKS, Hooks
from penjing.train.numerics import numerics_for
from penjing.train.objective import Objective
from penjing.train.parameters import is_batchnorm, make_optimizer, training_mode
from penjing.train.stepper import Stepper
from penjing.train.strategy import Strategy

DEFAULT_BATCH = 128
PROBED_STEPS = 5
"""Steps whose times plan the rest where `max_seconds` limits it; the first is not counted."""

RECENT = 50
RESERVE = 0.97


@dataclass(frozen=True)
class Fit:
    """What training did.

    Attributes:
        seconds: wall time of all of it; `data_seconds` of it went into waiting for batches.
        steps: optimizer steps taken, of `planned_steps`.
        examples: examples seen, repeats counted.
        losses: mean objective of each epoch (the last may be a part).
        events: what happened that was not planned, and choices made, in words.
    """

    seconds: float
    data_seconds: float
    steps: int
    planned_steps: int
    examples: int
    losses: tuple[float, ...]
    events: tuple[str, ...]

    @property
    def samples_per_s(self) -> float:
        """Return examples per second of computing, without the time spent waiting for data."""
        return self.examples / max(self.seconds - self.data_seconds, 1e-9)


def fit(
    model: Any,
    split: Split,
    objective: Objective,
    strategy: Strategy,
    *,
    seed: int = 0,
    covers: Callable[[str], bool] = lambda layer: True,
    hooks: Hooks = NO_HOOKS,
) -> Fit:
    """Train a torch module in place by a strategy; the same seed gives the same weights.

    Weights that a mask removes stay zero.

    Modes, frozen flags and the caller's random state are put back. Only a limit in seconds that bites
    makes the result depend on the machine's speed.

    Raises:
        Refused: all parameters are frozen, the split is empty, the loss diverges twice, or memory lacks.
    """
    import torch

    start = time.perf_counter()
    size = min(strategy.batch_size or DEFAULT_BATCH, max(len(split), 1))
    numerics = numerics_for(model, strategy.precision)
    alone = size == 1 and any(is_batchnorm(module) for module in model.modules())
    events = [f"computed in {numerics}"]
    if alone:
        events.append("batches of one example: BatchNorm keeps its statistics")
    feed = _Feed(split, size, seed)
    planned = total = max(1, math.ceil(strategy.epochs * feed.batches_an_epoch))
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with (
        torch.random.fork_rng(devices=devices),
        training_mode(model, covers, alone) as parameters,
        numerics.applied(model),
    ):
        torch.manual_seed(seed)
        stepper = Stepper(model, objective, strategy, numerics, make_optimizer(parameters, strategy), hooks)
        tally = _Tally(hooks.say, strategy.epochs)
        done, times = 0, []
        for epoch, (inputs, targets) in feed:
            began = time.perf_counter()
            loss = stepper.step(done, total, inputs, targets)
            done += 1
            tally.add(epoch, loss, len(targets))
            times.append(time.perf_counter() - began + feed.last_wait)
            if strategy.max_seconds is not None and done % PROBED_STEPS == 0:
                total = steps_within(total, done, median(times[1:][-RECENT:]), start + strategy.max_seconds)
            if done >= total:
                break
        stepper.finish(done)
        tally.close()
    if total < planned:
        events.append(
            f"{strategy.max_seconds:g} s allow {total} of {planned} steps: schedule shortened to fit"
        )
    return Fit(
        seconds=time.perf_counter() - start,
        data_seconds=feed.waited,
        steps=done,
        planned_steps=planned,
        examples=tally.examples,
        losses=tuple(tally.losses),
        events=(*events, *feed.events, *stepper.events),
    )


def steps_within(total: int, done: int, seconds_a_step: float, end: float) -> int:
    """Return how many steps in all fit before `end` (of `time.perf_counter`): `total`, or fewer.

    At least `done`; a small reserve is kept, and nothing changes unless the limit is really missed.
    """
    left = end - time.perf_counter()
    if (total - done) * seconds_a_step <= left:
        return total
    return min(total, done + max(0, int(RESERVE * left / seconds_a_step)))


class _Feed:
    """Endless batches in an order drawn from the seed; a last batch of one joins the one before."""

    def __init__(self, split: Split, size: int, seed: int) -> None:
        self.waited, self.last_wait = 0.0, 0.0
        self.events: list[str] = []
        self._split, self._size, self._seed = split, size, seed
        whole, rest = divmod(len(split), size)
        self.batches_an_epoch = whole + (rest > 1)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        epoch = 0
        while True:
            seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
            batches, count = self._merged(seed), 0
            while (batch := self._timed(batches)) is not None:
                yield epoch, batch
                count += 1
            if count == 0:
                raise Refused("the training split has examples", value=0, place=f"task.{self._split.name}")
            epoch += 1

    def _timed(self, batches: Iterator[Batch]) -> Batch | None:
        began = time.perf_counter()
        batch = next(batches, None)
        self.last_wait = time.perf_counter() - began
        self.waited += self.last_wait
        return batch

    def _merged(self, seed: int) -> Iterator[Batch]:
        held: Batch | None = None
        for batch in self._split.batches(self._size, seed):
            if held is not None and len(batch[1]) == 1 < self._size:
                held = _joined(held, batch)
                if not self.events:
                    self.events.append("a last batch of one example joins the batch before it")
                continue
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held


def _joined(first: Batch, second: Batch) -> Batch:
    inputs = tuple(np.concatenate(pair) for pair in zip(first[0], second[0], strict=True))
    return inputs, np.concatenate([first[1], second[1]])


class _Tally:
    """Mean loss of each epoch, said once an epoch."""

    def __init__(self, say: Callable[[str], None], epochs: float) -> None:
        self.losses: list[float] = []
        self.examples = 0
        self._say, self._epochs = say, epochs
        self._epoch, self._sum, self._count = 0, 0.0, 0

    def add(self, epoch: int, loss: float | None, examples: int) -> None:
        if epoch != self._epoch:
            self.close()
            self._epoch = epoch
        self.examples += examples
        if loss is not None:
            self._sum += loss * examples
            self._count += examples

    def close(self) -> None:
        if self._count:
            self.losses.append(self._sum / self._count)
            self._say(f"epoch {self._epoch + 1} of {self._epochs:g}: loss {self.losses[-1]:.4g}")
        self._sum, self._count = 0.0, 0
