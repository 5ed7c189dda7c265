"""One artefact in one runtime in one process of its own, which may crash or hang without harm."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.target import Target
from penjing.measurement.sealing import Factory, seal

_POLL_S = 0.1
_NEED_THE_CLASS = frozenset({"torch"})


class RuntimeProcess:
    """A killable process that holds one artefact, pinned to `target.threads` cores.

    Args:
        folder: the delivered artefact; its manifest is verified in the process.
        target: the runtime, its threads and batch.
        model: makes the user's own class, for runtimes that need it (torch).
        limit_bytes: resident memory above which the process is ended; None for no limit.
        timeout_s: longest time for one request.
        verify: whether to check the manifest (off only for files just written by the caller).

    Use it as a context manager; the process and all its children end with it.

    Raises:
        Refused: the artefact cannot be loaded, the process crashed (the signal is named), ran out of time
            or memory, or more threads were asked for than there are cores.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        *,
        model: Factory | None = None,
        limit_bytes: int | None = None,
        timeout_s: float = 600.0,
        verify: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.target = target
        self.timeout_s = timeout_s
        self.limit_bytes = limit_bytes
        cores = cores_for(target.threads)
        sealed = None
        if model is not None and target.runtime in _NEED_THE_CLASS:
            sealed = base64.b64encode(seal(model)).decode()
        # Address space bounds ONNX Runtime's arenas; torch maps far more than it uses.
        bounded = limit_bytes if target.runtime == "onnxruntime" else None
        self._start()
        try:
            facts = self._ask(
                "load",
                folder=str(self.folder),
                target=target.model_dump(mode="json"),
                cores=cores,
                verify=verify,
                model=sealed,
                path=sys.path,
                limit_bytes=bounded,
            )
        except BaseException:
            self.close()
            raise
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
        return self._finalizer.alive

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
        self._ask("batch", inputs=[str(path) for path in inputs])

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

    def _start(self) -> None:
        request_out, request_in = os.pipe()
        reply_out, reply_in = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-P", "-m", "penjing.measurement.worker", str(request_out), str(reply_in)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(request_out, reply_in),
                start_new_session=True,
                env=environment(self.target),
            )
        except OSError:
            for descriptor in (request_in, reply_out):
                os.close(descriptor)
            raise
        finally:
            os.close(request_out)
            os.close(reply_in)
        self._requests, self._replies, self._rest = request_in, reply_out, b""
        self._finalizer = weakref.finalize(self, _end, self._process, (request_in, reply_out), self._log)

    def _ask(self, action: str, **fields: Any) -> dict[str, Any]:
        if not self.alive:
            raise self._refusal("the process of the artefact is alive", "it ended earlier")
        line = (json.dumps({"do": action} | fields) + "\n").encode()
        deadline = time.monotonic() + self.timeout_s
        try:
            self._send(line, deadline)
            reply = json.loads(self._receive(deadline))
        except (EOFError, BrokenPipeError):
            raise self._died(action) from None
        except BaseException:
            # An answer may still be on its way: this process can no longer be talked to.
            self.close()
            raise
        if "refused" in reply:
            fields = reply["refused"]
            raise Refused(
                fields["rule"],
                value=fields["value"],
                place=fields["place"],
                fix=fields["fix"],
                code=Exit(fields["code"]),
            )
        if "failed" in reply:
            raise RuntimeError(f"the runtime process failed during {action}:\n{reply['failed']}")
        answer: dict[str, Any] = reply["ok"]
        return answer

    def _send(self, data: bytes, deadline: float) -> None:
        os.set_blocking(self._requests, False)
        rest = memoryview(data)
        while rest:
            self._wait(deadline, writing=True)
            rest = rest[os.write(self._requests, rest[:65536]) :]

    def _receive(self, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            self._wait(deadline, writing=False)
            part = os.read(self._replies, 1 << 20)
            if not part:
                raise EOFError
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _wait(self, deadline: float, writing: bool) -> None:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._refusal("the artefact answers in time", f"no answer in {self.timeout_s:g} s")
            # Without a memory limit nothing has to be polled, and an idle parent does not disturb timing.
            pause = left if self.limit_bytes is None else min(left, _POLL_S)
            readable, writable, _ = select.select(
                [] if writing else [self._replies], [self._requests] if writing else [], [], pause
            )
            if readable or writable:
                return
            self._check_memory()

    def _check_memory(self) -> None:
        if self.limit_bytes is None:
            return
        with contextlib.suppress(psutil.Error):
            used = psutil.Process(self._process.pid).memory_info().rss
            if used > self.limit_bytes:
                raise self._refusal(
                    "the artefact runs within the memory limit", f"{used} of {self.limit_bytes} bytes"
                )

    def _died(self, action: str) -> Refused:
        code = _exit_code(self._process)
        if code is None:
            word = "closed its pipe"
        elif code < 0:
            word = f"killed by {signal.Signals(-code).name}"
            word += " (often the system, out of memory)" if -code == signal.SIGKILL else ""
        else:
            word = f"exit code {code}"
        self._log.seek(0)
        said = self._log.read()[-2000:].decode(errors="replace")
        self.close()
        error = self._refusal("the process of the artefact survives", f"{word} during {action}")
        error.add_note(said)
        return error

    def _refusal(self, rule: str, value: str) -> Refused:
        return Refused(rule, value=value, place=f"{self.target.label} on {self.folder}")


def cores_for(threads: int) -> list[int]:
    """Choose the cores for a number of threads: the last ones that this process may use.

    Interrupts gather on the first cores. Every process of a comparison gets the same cores, so that what
    else runs on the machine disturbs all of them alike.

    Raises:
        Refused: there are fewer cores than threads.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if threads > len(cores):
        raise Refused(
            "there is a core for every thread",
            value=f"{threads} threads, {len(cores)} cores",
            place="target.threads",
            fix=f"use at most {len(cores)}",
            code=Exit.ENVIRONMENT,
        )
    return cores[-threads:]


def environment(target: Target) -> dict[str, str]:
    """Return the environment of a runtime process: pinned, passive thread pools.

    For torch glibc keeps large blocks instead of returning and faulting them again at each call; stock
    eager would otherwise be a baseline that is too easy to beat.
    """
    threads = str(target.threads)
    fixed = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "OMP_PROC_BIND": "false",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if target.runtime == "torch":
        fixed |= {
            "MALLOC_MMAP_THRESHOLD_": str(2**25),
            "MALLOC_TRIM_THRESHOLD_": str(2**30),
            "MALLOC_TOP_PAD_": str(2**26),
        }
    return {**os.environ, **fixed}


def save_arrays(folder: Path, arrays: Arrays, name: str) -> tuple[Path, ...]:
    """Write arrays as `NAME.<i>.npy` for a process to map; object arrays are refused."""
    paths = []
    for i, array in enumerate(arrays):
        if array.dtype.hasobject:
            raise Refused(
                "inputs are numbers",
                value=array.dtype,
                place=f"input {i}",
                fix="convert texts and objects to numbers first",
            )
        paths.append(folder / f"{name}.{i}.npy")
        np.save(paths[-1], array, allow_pickle=False)
    return tuple(paths)


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Wait a little for a process whose pipe closed; its id stays reserved until `_end` reaps it."""
    for _ in range(50):
        state = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if state is not None:
            return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
        time.sleep(0.1)
    return None


def _end(process: subprocess.Popen[bytes], descriptors: tuple[int, ...], log: Any) -> None:
    # The group is killed before its leader is reaped, so that the number cannot belong to anyone else.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for descriptor in descriptors:
        os.close(descriptor)
    log.close()
