"""What runs in the process of one artefact: it opens the artefact in its runtime and answers requests."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused
from penjing.core.target import Runner, Target, runtime_for
from penjing.core.value import Model
from penjing.processes.channel import Channel, Message, attempt

Factory = Callable[[], Model]
"""Makes a model of the user's own class; called without arguments."""

_HEADROOM = 2**28
_NO_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")


@dataclass
class Served:
    """One artefact in its runtime, and what can be asked of it; every answer is plain data.

    Attributes:
        folder, target: of the artefact.
        cores: that the process is pinned to.
        verify: whether the manifest is checked.
        limit_bytes: of memory that the process may still allocate; None for no limit.
        factory: makes the user's class, for runtimes that need it.
        runner: the opened artefact.
        batch: what `time` calls it on.
    """

    folder: Path
    target: Target
    cores: list[int]
    verify: bool
    limit_bytes: int | None
    factory: Factory | None = None
    runner: Runner | None = None
    batch: tuple[NDArray[Any], ...] = ()

    def carry_out(self, name: str, request: Message) -> Message:
        """Carry one request out.

        Raises:
            Refused: also where memory ran out, or the user's code called `sys.exit`.
        """
        actions: dict[str, Callable[..., Message]] = {
            "open": self.open,
            "outputs": self.outputs,
            "set_batch": self.set_batch,
            "time": self.time,
            "memory": self.memory,
        }
        try:
            return actions[name](**request)
        except Exception as error:
            if not _lacks_memory(error):
                raise
            raise Refused(
                "must run within its memory limit",
                value=str(error).strip()[:200] or "out of memory",
                place=f"{self.target.label} on {self.folder}",
                fix="use a smaller batch or a higher memory limit",
            ) from None
        except SystemExit as error:
            raise Refused(
                "must return a model, not end the process",
                value=f"sys.exit({error.code!r})",
                place="model()",
                fix="raise an exception where the model cannot be made",
            ) from None

    def open(self) -> Message:
        """Pin the process, verify the artefact's manifest and open it in its runtime."""
        from penjing.core.artefact import open_artefact

        cores = _pin(self.cores)
        if self.verify:
            open_artefact(self.folder)
        before = memory("VmRSS")
        if self.limit_bytes is not None:
            _limit_data(self.limit_bytes)
        self.runner = runtime_for(self.target).open(self.folder, self.target, self.factory)
        modules = [name for name in ("torch", "scipy", "sklearn") if name in sys.modules]
        return {"cores": cores, "rss_before_bytes": before, "modules": modules, "pid": os.getpid()}

    def outputs(self, inputs: list[str], batch: int, to: str) -> Message:
        """Run every example, batch by batch, and write the outputs to a `.npy` file.

        A runner with a fixed batch takes fewer examples filled up with copies of the last.
        """
        runner = self._loaded()
        fixed = getattr(runner, "fixed_batch", None)
        parts = _batches(_read(inputs), min(batch, fixed or batch))
        outputs = np.concatenate([_run(runner, part, fixed) for part in parts])
        np.save(to, outputs, allow_pickle=False)
        return {"examples": len(outputs)}

    def set_batch(self, inputs: list[str]) -> Message:
        """Read the one batch that `time` calls the artefact on."""
        self.batch = tuple(np.array(x) for x in _read(inputs))
        return {}

    def time(self, calls: int, warmup: int) -> Message:
        """Time calls on the fixed batch, each in milliseconds, after some that are not counted."""
        runner, batch = self._loaded(), self.batch
        for _ in range(warmup):
            runner(*batch)
        spans = np.empty(calls, dtype=np.int64)
        clock = time.perf_counter_ns
        with _no_collection():
            for i in range(len(spans)):
                start = clock()
                runner(*batch)
                spans[i] = clock() - start
        return {"ms": (spans / 1e6).tolist()}

    def memory(self) -> Message:
        """Return the peak and the present resident memory in bytes; None where the system has no count."""
        return {"peak_bytes": memory("VmHWM"), "rss_bytes": memory("VmRSS")}

    def _loaded(self) -> Runner:
        assert self.runner is not None, "open comes first"
        return self.runner


def serve(factory: Factory | None, channel: Channel, served: Served) -> Message:
    """Open an artefact and answer requests until there are no more.

    A request is `{"do": NAME, ...}` with the arguments of a method of `Served`: `open` first, then `outputs`,
    `set_batch`, `time` and `memory`.
    """
    served.factory = factory
    for request in channel.requests():
        channel.send(attempt(partial(served.carry_out, request.pop("do"), request)))
    return {}


def memory(field: str) -> int | None:
    """Read `VmRSS`, `VmHWM` (its peak) or `VmData` of this process in bytes; None off Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _pin(cores: list[int]) -> list[int]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
        return sorted(os.sched_getaffinity(0))
    return []


def _limit_data(limit_bytes: int) -> None:
    """Let the system refuse what the process allocates beyond a number of bytes from now on.

    What counts is writable private memory, so that the files of libraries and reserved addresses, of which
    torch maps far more than it uses, do not.
    """
    import resource

    # Stacks of threads and what allocators keep count as well, hence the headroom.
    bound = (memory("VmData") or 0) + limit_bytes + _HEADROOM
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or bound < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))


def _lacks_memory(error: BaseException) -> bool:
    """Tell whether an exception is of memory that was not granted; every library words that in its way."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def _read(paths: list[str]) -> tuple[NDArray[Any], ...]:
    return tuple(np.load(path, allow_pickle=False, mmap_mode="r") for path in paths)


def _batches(arrays: tuple[NDArray[Any], ...], size: int) -> Iterator[tuple[NDArray[Any], ...]]:
    for start in range(0, len(arrays[0]), size):
        yield tuple(np.array(x[start : start + size]) for x in arrays)


def _run(runner: Runner, batch: tuple[NDArray[Any], ...], fixed: int | None) -> NDArray[Any]:
    count = len(batch[0])
    if fixed is not None and count < fixed:
        batch = tuple(np.concatenate([x, np.repeat(x[-1:], fixed - count, axis=0)]) for x in batch)
    output = np.asarray(runner(*batch))
    if output.ndim == 0 or len(output) < count:
        raise Refused(
            "must have one row for each example",
            value=output.shape,
            place="output",
            fix="give the model's output the batch as its first dimension",
        )
    return output[:count]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
