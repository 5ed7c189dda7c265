"""Batches in a seeded order, and the mean loss of each epoch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from penjing.core.errors import Refused
from penjing.core.progress import Line, Say
from penjing.core.task import Batch, Split

PROBED_BATCHES = 10
"""Batches after which it is judged whether training waits for its data."""

WAIT_SHARE = 0.3
"""Share of the time spent waiting from which on batches are prefetched."""

PREFETCHED = 3
"""Batches that are prefetched."""


class BatchFeed:
    """Endless batches in an order drawn from the seed.

    A last batch of one example joins the one before, and so does one with fewer examples than processes. Data
    that are read anew in every epoch are prefetched by a thread once waiting for them takes 30% of the time.

    Args:
        split: training data.
        size: examples in a batch, at least 1.
        seed: of the order.
        world_size: processes that share every batch.
        clock: seconds that pass.

    >>> split = Split((np.zeros((5, 1), np.float32),), np.arange(5), "train")
    >>> feed = BatchFeed(split, size=2, seed=0)
    >>> batches = feed.iterate()
    >>> [len(targets) for _, (_, targets) in (next(batches), next(batches))], feed.batches_per_epoch
    ([2, 3], 2)
    """

    def __init__(
        self,
        split: Split,
        size: int,
        seed: int,
        world_size: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.wait_seconds, self.last_wait = 0.0, 0.0
        self.events: list[str] = []
        self._split, self._size, self._seed, self._clock = split, size, seed, clock
        whole, rest = divmod(len(split), size)
        self._smallest = max(2, world_size)
        self._live = getattr(split, "inputs", None) is None
        self._began, self._read, self._prefetching = clock(), 0, False
        self.batches_per_epoch = whole + (rest >= self._smallest)

    def iterate(self, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield the number of the epoch and a batch `(inputs, targets)`, beginning with batch `start`.

        Raises:
            Refused: the split is empty.
        """
        epoch, skipped = divmod(start, max(1, self.batches_per_epoch))
        while True:
            seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
            batches, count = self._merged(seed), 0
            if self._prefetching:
                batches = prefetch(batches)
            while (batch := self._timed(batches)) is not None:
                count += 1
                if not self._prefetching and self._waits():
                    self._prefetching, batches = True, prefetch(batches)
                if count > skipped:
                    yield epoch, batch
            skipped = 0
            if count == 0:
                raise Refused(
                    "needs at least one example",
                    value=0,
                    place=f"task.{self._split.name}",
                    fix="give data, or raise max_examples",
                )
            epoch += 1

    def _timed(self, batches: Iterator[Batch]) -> Batch | None:
        began = self._clock()
        batch = next(batches, None)
        self.last_wait = self._clock() - began
        self.wait_seconds += self.last_wait
        self._read += 1
        return batch

    def _waits(self) -> bool:
        """Tell whether training waits for its data so much that prefetching may help, and say so."""
        if not self._live or self._read < PROBED_BATCHES:
            return False
        share = self.wait_seconds / max(self._clock() - self._began, 1e-9)
        if share < WAIT_SHARE:
            return False
        self.events.append(f"{share:.0%} of the time waits for data: batches are prefetched by a thread")
        return True

    def _merged(self, seed: int) -> Iterator[Batch]:
        held: Batch | None = None
        for batch in self._split.batches(self._size, seed):
            if held is not None and len(batch[1]) < self._smallest <= self._size:
                held = _concatenate(held, batch)
                if not self.events:
                    few = "one example" if len(batch[1]) == 1 else f"{len(batch[1])} examples"
                    self.events.append(f"a last batch of {few} joins the batch before it")
                continue
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the same batches in the same order, the next three being read by a thread meanwhile.

    >>> list(prefetch(iter([1, 2, 3, 4])))
    [1, 2, 3, 4]
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(PREFETCHED))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, batches, None))
            yield batch


def _concatenate(first: Batch, second: Batch) -> Batch:
    inputs = tuple(np.concatenate(pair) for pair in zip(first[0], second[0], strict=True))
    return inputs, np.concatenate([first[1], second[1]])


class LossMeter:
    """Mean loss of each epoch, logged once an epoch.

    >>> meter = LossMeter(print, epochs=2)
    >>> meter.add(0, 1.0, examples=2), meter.add(0, 4.0, examples=1), meter.add(1, 1.5, examples=2)
    epoch 1 of 2: loss 2
    (None, None, None)
    >>> meter.close()
    epoch 2 of 2: loss 1.5
    >>> meter.losses
    [2.0, 1.5]
    """

    _KEPT = ("losses", "examples", "_epoch", "_sum", "_count")

    def __init__(self, log: Say, epochs: float) -> None:
        self.losses: list[float] = []
        self.examples = 0
        self._log, self._epochs = log, epochs
        self._epoch, self._sum, self._count = 0, 0.0, 0

    def add(self, epoch: int, loss: float | None, examples: int) -> None:
        """Count a step's loss; None counts examples only."""
        if epoch != self._epoch:
            self.close()
            self._epoch = epoch
        self.examples += examples
        if loss is not None:
            self._sum += loss * examples
            self._count += examples

    @property
    def mean(self) -> float:
        """Return the mean of the epoch that runs, or of the last one."""
        return self._sum / self._count if self._count else self.losses[-1] if self.losses else math.nan

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on."""
        return {name: getattr(self, name) for name in self._KEPT}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name in self._KEPT:
            setattr(self, name, state[name])

    def close(self) -> None:
        """End an epoch and log its mean."""
        if self._count:
            self.losses.append(self._sum / self._count)
            self._log(
                Line.training(f"epoch {self._epoch + 1} of {self._epochs:g}: loss {self.losses[-1]:.4g}")
            )
        self._sum, self._count = 0.0, 0
