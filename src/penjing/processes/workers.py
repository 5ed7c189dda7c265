"""The local executor: one killable process per job, which no job can take the driver down with."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from penjing.core.budget import say as in_words
from penjing.core.errors import Refused
from penjing.core.executor import Finished, Job, Limits, Refusal, refusal_of
from penjing.core.progress import Line, Say, silent
from penjing.processes.child import Child, Output
from penjing.processes.packing import pack
from penjing.processes.worker import checked

_TICK_S = 0.5
_IDLE_TICK_S = 2.0
_LINES = 25
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGSYS}


class LocalExecutor:
    """Runs jobs on this machine; implements `penjing.core.executor.Executor`.

    Args:
        payload: what all jobs share (model, task); packed once, in memory shared by all children.
        logs: folder for what the jobs print, `NAME.log` each; None keeps only the last lines.
        environment: variables for the children, for example OMP_NUM_THREADS.
        in_process: run jobs in this process, for models that cannot be packed. Limits do not hold then,
            and a native crash ends the driver; every result carries a note that says so.

    Raises:
        Refused: a part of the payload cannot be sent to another process; the part is named.
    """

    def __init__(
        self,
        payload: Any,
        *,
        logs: Path | None = None,
        environment: Mapping[str, str] | None = None,
        in_process: bool = False,
    ) -> None:
        self._logs = logs
        self._environment = dict(environment or {})
        self._payload = payload if in_process else None
        self._packed: IO[bytes] | None = None if in_process else pack(payload, "payload")

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the payload; no job can run afterwards."""
        if self._packed is not None:
            self._packed.close()

    def run(
        self, job: Job, *args: Any, limits: Limits, name: str = "job", say: Say | None = None
    ) -> Finished:
        """Run `job(payload, say, *args)` to its end and tell how it ended.

        Raises:
            Refused: the job cannot be sent or started, or its log cannot be written.
            KeyboardInterrupt: after the job and all its children were ended.
        """
        if self._packed is None:
            return _run_here(job, self._payload, args, say or silent)
        start = time.monotonic()
        output = Output(None if self._logs is None else self._logs / f"{name}.log")
        with pack((job, args), f"job {name}") as arguments:
            descriptors = (self._packed.fileno(), arguments.fileno())
            child = Child("penjing.processes.worker", descriptors, self._environment, output)
        watch = _Watch(child, limits, say or silent, start)
        try:
            watch.until_end()
        finally:
            code = child.end(limits.grace_s)
            output.close()
        return watch.finished(code)


class _Watch:
    """Follows one child until it ends or breaks a limit."""

    def __init__(self, child: Child, limits: Limits, say: Say, start: float) -> None:
        self.child = child
        self.limits = limits
        self.say = say
        self.start = start
        self.outcome: dict[str, Any] | None = None
        self.ended: int | None = None
        self.stopped: dict[str, Any] | None = None
        self.peak = 0

    def until_end(self) -> None:
        tick = _TICK_S if self.limits.memory_bytes is not None else _IDLE_TICK_S
        next_look = self.start + tick
        while True:
            exited = self.child.exited()  # before the last messages are read, else some could be missed
            now = time.monotonic()
            self._read(0.0 if exited else max(0.0, min(next_look, self._deadline()) - now))
            if exited or self.ended is not None or self.stopped is not None:
                return
            now = time.monotonic()
            if now >= self._deadline():
                self.stopped = {"status": "timeout", "reason": f"stopped after {self.limits.seconds:g} s"}
            elif now >= next_look:
                next_look = now + tick
                self._look_at_memory()

    def _deadline(self) -> float:
        return float("inf") if self.limits.seconds is None else self.start + self.limits.seconds

    def _read(self, timeout: float) -> None:
        for message in self.child.messages(min(timeout, _TICK_S)):
            if "say" in message:
                self.say(Line(**message["say"]))
            elif "ended" in message:
                self.ended = message["ended"]
                self.peak = max(self.peak, message["peak_bytes"])
            else:
                self.outcome = message

    def _look_at_memory(self) -> None:
        limit, used = self.limits.memory_bytes, self.child.memory()
        if limit is not None and used > limit:
            used = self.child.own_memory()
            if used > limit:
                reason = f"killed: used {in_words(used, 'bytes')} of memory, limit {in_words(limit, 'bytes')}"
                self.stopped = {"status": "killed", "reason": reason}
        self.peak = max(self.peak, used)

    def finished(self, code: int) -> Finished:
        """Return the job's end; a result that came whole counts, whatever happened after it."""
        said = self.outcome or self.stopped or _by_exit(code if self.ended is None else self.ended)
        path = self.child.output.path
        return Finished(
            status=said["status"],
            value=said.get("value"),
            reason=said.get("reason", ""),
            detail=_last_lines(said["detail"]) if "detail" in said else self._log_tail(said["status"]),
            refusal=Refusal(**said["refusal"]) if "refusal" in said else None,
            peak_bytes=self.peak or None,
            seconds=time.monotonic() - self.start,
            log=None if path is None else str(path),
        )

    def _log_tail(self, status: str) -> str:
        return "" if status in ("done", "refused") else self.child.output.tail(_LINES)


def _by_exit(code: int) -> dict[str, Any]:
    if code >= 0:
        return {"status": "crashed", "reason": f"exited with code {code} without a result"}
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"SIG{-code}"
    if -code in _CRASHES:
        return {"status": "crashed", "reason": f"native crash: {name} (signal {-code})"}
    cause = ", probably out of memory" if -code == signal.SIGKILL else f", {name}"
    return {"status": "killed", "reason": f"killed (signal {-code}{cause})"}


def _run_here(job: Job, payload: Any, args: tuple[Any, ...], say: Say) -> Finished:
    start = time.monotonic()
    said: dict[str, Any]
    try:
        said = {"status": "done", "value": checked(job(payload, say, *args))}
    except Refused as refused:
        said = {"status": "refused", "refusal": refusal_of(refused), "reason": str(refused)}
    except Exception as error:  # noqa: BLE001  one candidate's defect must not end the run; it is reported
        detail = _last_lines(traceback.format_exc())
        said = {"status": "crashed", "reason": f"{type(error).__name__}: {error}", "detail": detail}
    note = (
        "ran in the driver's process: limits of time and memory do not hold, and a native crash ends the run"
    )
    return Finished(**said, seconds=time.monotonic() - start, notes=(note,))


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LINES:])
