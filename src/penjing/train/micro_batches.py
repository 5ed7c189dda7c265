"""In how many micro-batches a batch is computed: more where memory lacks, fewer again where it is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import psutil

from penjing.core.errors import Exit, Refused

SMALLEST = 4
"""Examples in the smallest micro-batch of a halved batch; those of one have no batch statistics."""

LOOK_EVERY = 100
"""Steps after which it is looked whether memory is to spare again; twice as many after every lack of it."""

PLENTY = 2.0
"""Micro-batches grow where at least so many times the memory is free that was when it lacked."""


def free_memory(device: str) -> int:
    """Return the bytes that are free on a kind of device, `cpu` or `cuda`."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


class MicroBatches:
    """Micro-batches of a batch, whose gradients are accumulated.

    Args:
        accumulation_steps: micro-batches of every batch at least.
        free: tells how many bytes are free.
        events: gets what was changed, in words.

    >>> micro_batches = MicroBatches(2, free=lambda: 10**9, events=[])
    >>> micro_batches.count(64)
    2
    >>> micro_batches.halve(step=7, total=64, error=MemoryError())
    >>> micro_batches.count(64)
    4
    """

    def __init__(self, accumulation_steps: int, free: Callable[[], int], events: list[str]) -> None:
        self._asked, self._free, self._events = accumulation_steps, free, events
        self._size: int | None = None
        self._short, self._next, self._every = 0, 0, LOOK_EVERY

    def count(self, total: int) -> int:
        """Return the number of micro-batches of a batch of `total` examples."""
        asked = min(self._asked, total)
        return asked if self._size is None else max(asked, math.ceil(total / self._size))

    def halve(self, step: int, total: int, error: Exception) -> None:
        """Make micro-batches half as large.

        Args:
            step: number of the step.
            total: examples of the batch.
            error: that told of the lack of memory.

        Raises:
            Refused: micro-batches of four examples do not fit.
        """
        before = math.ceil(total / self.count(total))
        size = (before + 1) // 2
        if size < SMALLEST:
            raise Refused(
                "a training step must fit in memory",
                value=f"{before} examples that do not",
                place="training",
                fix="free memory or use a smaller model",
                code=Exit.ENVIRONMENT,
            ) from error
        if self._size is not None:
            self._every *= 2
        self._size, self._short, self._next = size, self._free(), step + self._every
        self._events.append(f"out of memory: gradients are accumulated over micro-batches of {size} examples")

    def grow(self, step: int, total: int) -> None:
        """Make micro-batches twice as large again where there is memory to spare.

        Args:
            step: number of the step.
            total: examples of the batch.
        """
        if self._size is None or step < self._next:
            return
        self._next, free = step + self._every, self._free()
        if free < PLENTY * self._short:
            return
        self._size *= 2
        words = f"micro-batches have {self._size} examples"
        if math.ceil(total / self._size) <= self._asked:
            self._size, words = None, "micro-batches are as asked for"
        self._events.append(f"step {step}: {free / 1e9:.2g} GB are free again: {words}")

    def state(self) -> list[Any]:
        """Return all that `restore` needs."""
        return [self._size, self._short, self._next, self._every]

    def restore(self, state: list[Any]) -> None:
        """Go on from a state."""
        self._size, self._short, self._next, self._every = state
