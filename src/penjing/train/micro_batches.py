"""In how many parts a batch is computed: more where memory lacks, fewer again where it is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import psutil

from penjing.core.errors import Exit, Refused

SMALLEST = 4
"""Examples in the smallest part of a halved batch; parts of one have no batch statistics."""

LOOK_EVERY = 100
"""Steps after which it is looked whether memory is to spare again; twice as many after every lack of it."""

PLENTY = 2.0
"""Parts grow where at least so many times the memory is free that was when it lacked."""


def free_memory(device: str) -> int:
    """Return the bytes that are free on a kind of device."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


class Parts:
    """Parts of a batch whose gradients add up.

    Args:
        asked: parts of every batch at least.
        free: tells how many bytes are free.
        events: gets what was changed, in words.
    """

    def __init__(self, asked: int, free: Callable[[], int], events: list[str]) -> None:
        self._asked, self._free, self._events = asked, free, events
        self._size: int | None = None
        self._short, self._next, self._every = 0, 0, LOOK_EVERY

    def count(self, total: int) -> int:
        """Return the number of parts of a batch of so many examples."""
        asked = min(self._asked, total)
        return asked if self._size is None else max(asked, math.ceil(total / self._size))

    def halve(self, number: int, total: int, error: Exception) -> None:
        """Make parts half as large.

        Args:
            number: of the step.
            total: examples of the batch.
            error: that told of the lack of memory.

        Raises:
            Refused: parts of four examples do not fit.
        """
        before = math.ceil(total / self.count(total))
        size = (before + 1) // 2
        if size < SMALLEST:
            raise Refused(
                "a training step fits in memory",
                value=f"{before} examples do not",
                place="training",
                fix="free memory or use a smaller model",
                code=Exit.ENVIRONMENT,
            ) from error
        if self._size is not None:
            self._every *= 2
        self._size, self._short, self._next = size, self._free(), number + self._every
        self._events.append(f"out of memory: batches are summed from parts of {size} examples")

    def look(self, number: int, total: int) -> None:
        """Make parts twice as large again where there is memory to spare."""
        if self._size is None or number < self._next:
            return
        self._next, free = number + self._every, self._free()
        if free < PLENTY * self._short:
            return
        self._size *= 2
        words = f"summed from parts of {self._size} examples"
        if math.ceil(total / self._size) <= self._asked:
            self._size, words = None, "as they were"
        self._events.append(f"step {number}: {free / 1e9:.2g} GB are free again: batches are {words}")

    def state(self) -> list[Any]:
        """Return all that `restore` needs."""
        return [self._size, self._short, self._next, self._every]

    def restore(self, state: list[Any]) -> None:
        """Go on from a state."""
        self._size, self._short, self._next, self._every = state
