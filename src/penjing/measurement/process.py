"""One artefact in one runtime in one process of its own, which may crash, hang or grow without harm."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Finished, Limits, refused_from
from penjing.core.files import refusing
from penjing.core.system import system_error
from penjing.core.target import Target
from penjing.core.value import Model
from penjing.measurement.serving import Factory, Served, serve
from penjing.processes.child import Child, Output
from penjing.processes.follow import ask
from penjing.processes.packing import pack

LONGEST_S = 600.0
"""Seconds of one request where the caller states no limit."""

MEMORY_SHARE = 0.9
"""Share of the free memory that one process may take where the caller states no limit."""

_NEED_THE_CLASS = frozenset({"torch"})


def factory_of(model: Model) -> Factory:
    """Return a factory that hands over a model at hand."""
    return partial(_itself, model)


def _itself(model: Model) -> Model:
    return model


def usual_limits() -> Limits:
    """Return the limits where the caller states none: 600 s a request, nine tenths of the free memory.

    >>> usual_limits().seconds
    600.0
    """
    available = int(psutil.virtual_memory().available)
    return Limits(seconds=LONGEST_S, memory_bytes=int(MEMORY_SHARE * available))


class Lost(Refused):
    """The process of an artefact ended, or was ended at a limit, instead of answering."""


class RuntimeProcess:
    """A killable process that holds one artefact, pinned to `target.threads` cores.

    Args:
        folder: the delivered artefact; its manifest is verified in the process.
        target: the runtime, its threads and batch.
        model: makes the user's own class, for runtimes that need it (torch).
        limits: seconds of one request, and memory: of the process with its children as it is watched, of
            the process alone as the system grants it. None for `usual_limits`.
        verify: whether to check the manifest (off only for files just written by the caller).

    Use it as a context manager; the process and all its children end with it.

    >>> with RuntimeProcess(folder, Target()) as process:  # doctest: +SKIP
    ...     process.set_batch(save_arrays(Path("scratch"), (x[:1],), "batch"))
    ...     milliseconds = process.time(calls=100, warmup=10)

    Raises:
        Refused: the artefact cannot be loaded, the process crashed (the signal is named), ran out of time
            or memory (these three as `Lost`), the disk is full or something else of the machine stands in
            the way (environment), or more threads were asked for than there are cores.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        *,
        model: Factory | None = None,
        limits: Limits | None = None,
        verify: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.target = target
        self.limits = usual_limits() if limits is None else limits
        cores = cores_for(target.threads)
        factory = model if target.runtime in _NEED_THE_CLASS else None
        call = (serve, (Served(self.folder, target, cores, verify, self.limits.memory_bytes),))
        with pack(factory, "model()") as payload, pack(call, "request") as packed:
            self._child = Child(payload, packed, environment(target), Output(None))
        self._finalizer = weakref.finalize(self, self._child.end, 0.0)
        try:
            facts = self._ask("open")
        except BaseException:
            self.close()
            raise
        self.pid: int = facts["pid"]
        self.rss_before_bytes: int | None = facts["rss_before_bytes"]
        self.cores: list[int] = facts["cores"]
        self.modules: list[str] = facts["modules"]

    def __enter__(self) -> RuntimeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process still answers."""
        return not self._child.ended

    def outputs(self, inputs: Sequence[Path], batch: int, to: Path) -> NDArray[Any]:
        """Run every example of the inputs (`.npy` files, one per input) and return the outputs.

        Args:
            inputs: written by `save_arrays`; the first axis is the examples.
            batch: examples in one call; a model with a fixed batch uses its own.
            to: the `.npy` file that the process writes.
        """
        self._ask("outputs", inputs=[str(path) for path in inputs], batch=batch, to=str(to))
        outputs: NDArray[Any] = np.load(to, allow_pickle=False)
        return outputs

    def set_batch(self, inputs: Sequence[Path]) -> None:
        """Choose the one batch that `time` uses."""
        self._ask("set_batch", inputs=[str(path) for path in inputs])

    def time(self, calls: int, warmup: int = 0) -> list[float]:
        """Return the milliseconds of each of `calls` calls, after `warmup` calls that are not timed."""
        spans: list[float] = self._ask("time", calls=calls, warmup=warmup)["ms"]
        return spans

    def peak_memory_bytes(self) -> int | None:
        """Return the peak resident memory of the process so far; None where the system has no count."""
        peak: int | None = self._ask("memory")["peak_bytes"]
        return peak

    def close(self) -> None:
        """End the process and everything that it started; safe to call twice."""
        self._finalizer()

    def _ask(self, action: str, **fields: Any) -> dict[str, Any]:
        if not self.alive:
            raise Lost(
                "must be open",
                value="a process that has ended",
                place=self.place,
                fix="open the artefact again",
            )
        finished = ask(self._child, {"do": action} | fields, self.limits)
        if finished.value is not None:
            return finished.value
        refused = None if finished.refusal is None else refused_from(finished.refusal)
        if finished.fault and (refused is None or refused.code != Exit.ENVIRONMENT):
            raise self._hindered(action, finished)
        if refused is not None:
            raise refused
        if self.alive:
            raise RuntimeError(f"the runtime process failed during {action}:\n{finished.detail}")
        raise self._lost(action, finished)

    def _lost(self, action: str, finished: Finished) -> Lost:
        if finished.status == "timeout":
            value = f"no answer to {action} in {self.limits.seconds:g} s"
            fix = "give it more time, or a smaller batch"
            return Lost("must answer in time", value=value, place=self.place, fix=fix)
        error = Lost(
            "must survive",
            value=f"{finished.reason} during {action}",
            place=self.place,
            fix="give it more memory or a smaller batch, or choose another target",
        )
        if finished.detail:
            error.add_note(finished.detail)
        return error

    def _hindered(self, action: str, finished: Finished) -> Refused:
        error = Refused(
            "must find room, permission and free files on the machine",
            value=f"{finished.reason} during {action}",
            place=self.place,
            fix="mend what the message names, then go on",
            code=Exit.ENVIRONMENT,
        )
        error.__cause__ = system_error(finished.fault)
        return error

    @property
    def place(self) -> str:
        """The target and the folder, for refusals."""
        return f"{self.target.label} on {self.folder}"


def cores_for(threads: int) -> list[int]:
    """Choose the cores for a number of threads: the last ones that this process may use.

    Interrupts gather on the first cores. Every process of a comparison gets the same cores, so that what
    else runs on the machine disturbs all of them alike.

    >>> len(cores_for(1))
    1

    Raises:
        Refused: there are fewer cores than threads.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if threads > len(cores):
        raise Refused(
            "there must be a core for every thread",
            value=f"{threads} threads, {len(cores)} cores",
            place="target.threads",
            fix=f"use at most {len(cores)}",
            code=Exit.ENVIRONMENT,
        )
    return cores[-threads:]


def environment(target: Target) -> dict[str, str]:
    """Return the variables that a runtime process has besides ours: pinned, passive thread pools.

    For torch glibc keeps large blocks instead of returning and faulting them again at each call; stock
    eager would otherwise be a baseline that is too easy to beat.

    >>> environment(Target(threads=2))["OMP_NUM_THREADS"]
    '2'
    """
    threads = str(target.threads)
    fixed = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "OMP_PROC_BIND": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if target.runtime == "torch":
        fixed |= {
            "MALLOC_MMAP_THRESHOLD_": str(2**25),
            "MALLOC_TRIM_THRESHOLD_": str(2**30),
            "MALLOC_TOP_PAD_": str(2**26),
        }
    return fixed


def save_arrays(folder: Path, arrays: Arrays, name: str) -> tuple[Path, ...]:
    """Write arrays as `NAME.<i>.npy` for a process to map, and return the paths.

    >>> save_arrays(Path("scratch"), (np.eye(2),), "inputs")  # doctest: +SKIP
    (PosixPath('scratch/inputs.0.npy'),)

    Raises:
        Refused: an array holds objects, or the disk is full (environment).
    """
    paths = []
    for i, array in enumerate(arrays):
        if array.dtype.hasobject:
            raise Refused(
                "must be numbers",
                value=array.dtype,
                place=f"input {i}",
                fix="convert texts and objects to numbers first",
            )
        paths.append(folder / f"{name}.{i}.npy")
        with refusing(paths[-1]):
            np.save(paths[-1], array, allow_pickle=False)
    return tuple(paths)
