"""Wait for what a child answers, under limits of time and memory, and tell how it ended."""

from __future__ import annotations

import signal
import time
from typing import Any

from penjing.core.budget import say as in_words
from penjing.core.executor import Finished, Limits, Refusal
from penjing.core.progress import Line, Say, silent
from penjing.processes.child import Child

_TICK_S = 0.5
_IDLE_TICK_S = 2.0
_LINES = 25
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGSYS}


def follow(child: Child, limits: Limits, say: Say = silent, start: float | None = None) -> Finished:
    """Wait until a child has ended, or end it where it breaks a limit; nothing of it is left.

    Args:
        child: of which the one answer is the result of its function.
        limits: of its whole life.
        say: gets its lines of progress.
        start: when its time began, on the monotonic clock; None for now.

    Raises:
        KeyboardInterrupt: after the child and all its family were ended.
    """
    watch = _Watch(child, limits, say, start)
    try:
        watch.wait(for_answer=False)
    finally:
        code = child.end(limits.grace_s)
        child.output.close()
    return watch.finished(code)


def ask(child: Child, request: dict[str, Any], limits: Limits) -> Finished:
    """Send a request and wait for its answer; a child that gives none within the limits is ended."""
    watch = _Watch(child, limits, silent, None)
    try:
        child.send(request)
        watch.wait(for_answer=True)
    except BaseException:
        child.end(0.0)  # its answer may still be on its way
        raise
    return watch.finished(None if watch.outcome is not None else child.end(0.0))


class _Watch:
    """Follows one child until it answers, ends or breaks a limit."""

    def __init__(self, child: Child, limits: Limits, say: Say, start: float | None) -> None:
        self.child = child
        self.limits = limits
        self.say = say
        self.start = time.monotonic() if start is None else start
        self.outcome: dict[str, Any] | None = None
        self.ended: int | None = None
        self.stopped: dict[str, Any] | None = None
        self.peak = 0

    def wait(self, for_answer: bool) -> None:
        tick = _TICK_S if self.limits.memory_bytes is not None else _IDLE_TICK_S
        next_look = self.start + tick
        while True:
            exited = self.child.exited()  # before the last messages are read, else some could be missed
            now = time.monotonic()
            self._read(0.0 if exited else max(0.0, min(next_look, self._deadline()) - now))
            answered = for_answer and self.outcome is not None
            if answered or exited or self.ended is not None or self.stopped is not None:
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

    def finished(self, code: int | None) -> Finished:
        """Return the end; an answer that came whole counts, whatever happened after it."""
        code = code if self.ended is None else self.ended
        said = self.outcome or self.stopped or _by_exit(code or 0)
        path = self.child.output.path
        return Finished(
            status=said["status"],
            value=said.get("value"),
            reason=said.get("reason", ""),
            fault=said.get("fault", ""),
            detail=last_lines(said["detail"]) if "detail" in said else self._log_tail(said["status"]),
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


def last_lines(text: str) -> str:
    """Return the last 25 lines of a text."""
    return "\n".join(text.strip().splitlines()[-_LINES:])
