"""The process in which one artefact runs: reads requests from one pipe, answers on another.

Started as `python -P -m penjing.measurement.worker REQUESTS REPLIES` with two inherited file descriptors, so
that nothing a library writes to stdout can mix with the answers. Every request and every answer is a line
of JSON. When the pipe of requests closes, the process ends with its whole group, even in the middle of a
call: no orphan outlives the program that started it.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Exit, Refused
from penjing.core.target import Runner, Target, runtime_for

Answer = dict[str, Any]


class Worker:
    """One artefact in its runtime, and what can be asked of it."""

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.batch: tuple[NDArray[Any], ...] = ()

    def load(self, request: Answer) -> Answer:
        """Pin the process, verify the artefact's manifest and open it in its runtime."""
        from penjing.core.artefact import open_artefact

        target = Target(**request["target"])
        cores = _pin(request["cores"])
        folder = Path(request["folder"])
        if request["verify"]:
            open_artefact(folder)
        before = memory("VmRSS")
        if request["limit_bytes"] is not None:
            _limit_address_space(request["limit_bytes"])
        self.runner = runtime_for(target).open(folder, target, _factory(request))
        modules = [name for name in ("torch", "scipy", "sklearn") if name in sys.modules]
        return {"cores": cores, "rss_before_bytes": before, "modules": modules}

    def outputs(self, request: Answer) -> Answer:
        """Run every example, batch by batch, and write the outputs to a `.npy` file."""
        runner = self._loaded()
        arrays = _read(request["inputs"])
        size = getattr(runner, "fixed_batch", None) or request["batch"]
        outputs = np.concatenate([_run(runner, batch, size) for batch in _batches(arrays, size)])
        np.save(request["to"], outputs, allow_pickle=False)
        return {"examples": len(outputs)}

    def batch_of(self, request: Answer) -> Answer:
        """Read the one batch that `time` calls the artefact on."""
        self.batch = tuple(np.array(x) for x in _read(request["inputs"]))
        return {}

    def time(self, request: Answer) -> Answer:
        """Time calls on the fixed batch, each in milliseconds, after some that are not counted."""
        runner, batch = self._loaded(), self.batch
        for _ in range(request["warmup"]):
            runner(*batch)
        spans = np.empty(request["calls"], dtype=np.int64)
        clock = time.perf_counter_ns
        with _no_collection():
            for i in range(len(spans)):
                start = clock()
                runner(*batch)
                spans[i] = clock() - start
        return {"ms": (spans / 1e6).tolist()}

    def memory(self, request: Answer) -> Answer:
        """Return the peak and the present resident memory in bytes; None where the system has no count."""
        return {"peak_bytes": memory("VmHWM"), "rss_bytes": memory("VmRSS")}

    def _loaded(self) -> Runner:
        assert self.runner is not None, "load comes first"
        return self.runner


def memory(field: str) -> int | None:
    """Read `VmRSS` or `VmHWM` (the peak) of this process in bytes; None off Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def answer(worker: Worker, request: Answer) -> Answer:
    """Carry one request out; refusals and defects become data."""
    actions: dict[str, Callable[[Answer], Answer]] = {
        "load": worker.load,
        "outputs": worker.outputs,
        "batch": worker.batch_of,
        "time": worker.time,
        "memory": worker.memory,
    }
    try:
        return {"ok": actions[request["do"]](request)}
    except Refused as error:
        fields = {"rule": error.rule, "place": error.place, "fix": error.fix, "code": int(error.code)}
        return {"refused": fields | {"value": None if error.value is None else str(error.value)}}
    except MemoryError:
        return {"refused": _out_of_memory()}
    except Exception:  # noqa: BLE001
        # A defect: the parent raises it again, with this traceback.
        return {"failed": traceback.format_exc(limit=-8)}


def _out_of_memory() -> Answer:
    return {
        "rule": "the artefact runs within the memory limit",
        "value": "out of memory",
        "place": "worker",
        "fix": "use a smaller batch or a higher memory limit",
        "code": int(Exit.BAD_INPUT),
    }


def _pin(cores: list[int]) -> list[int]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
        return sorted(os.sched_getaffinity(0))
    return []


def _limit_address_space(limit_bytes: int) -> None:
    # Beyond what the interpreter has mapped already: thread stacks and arenas count, hence the headroom.
    import resource

    mapped = memory("VmSize") or 0
    resource.setrlimit(resource.RLIMIT_AS, (mapped + limit_bytes + 2**28, resource.RLIM_INFINITY))


def _factory(request: Answer) -> Callable[[], Any] | None:
    if request["model"] is None:
        return None
    import cloudpickle

    known = set(sys.path)
    sys.path.extend(path for path in request["path"] if path not in known)
    try:
        factory: Callable[[], Any] = cloudpickle.loads(base64.b64decode(request["model"]))
    except (ImportError, AttributeError, TypeError) as error:
        raise Refused(
            "the function that makes the model arrives in the other process",
            value=error,
            place="model()",
            fix="make the model inside the function, from plain values",
        ) from error
    return factory


def _read(paths: list[str]) -> tuple[NDArray[Any], ...]:
    return tuple(np.load(path, allow_pickle=False, mmap_mode="r") for path in paths)


def _batches(arrays: tuple[NDArray[Any], ...], size: int) -> Iterator[tuple[NDArray[Any], ...]]:
    for start in range(0, len(arrays[0]), size):
        yield tuple(np.array(x[start : start + size]) for x in arrays)


def _run(runner: Runner, batch: tuple[NDArray[Any], ...], size: int) -> NDArray[Any]:
    count = len(batch[0])
    if getattr(runner, "fixed_batch", None) and count < size:
        batch = tuple(np.concatenate([x, np.repeat(x[-1:], size - count, axis=0)]) for x in batch)
    output = np.asarray(runner(*batch))
    if output.ndim == 0 or len(output) < count:
        raise Refused(
            "the output has one row for each example",
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


def _listen(requests: int, inbox: queue.SimpleQueue[Answer]) -> None:
    with os.fdopen(requests, encoding="utf-8") as stream:
        for line in stream:
            inbox.put(json.loads(line))
    if os.getsid(0) == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(0)


def main(requests: int, replies: int) -> None:
    """Answer requests until the pipe closes."""
    faulthandler.enable()
    inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    worker = Worker()
    with os.fdopen(replies, "w", encoding="utf-8") as stream:
        while True:
            stream.write(json.dumps(answer(worker, inbox.get())) + "\n")
            stream.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
