"""The local executor: one killable process per job, which no job can take the driver down with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from penjing.core.executor import Finished, Job, Limits
from penjing.core.progress import Say, silent
from penjing.processes.channel import Channel, attempt
from penjing.processes.child import Child, Output
from penjing.processes.follow import follow, last_lines
from penjing.processes.packing import FIX, pack


class LocalExecutor:
    """Runs jobs on this machine; implements `penjing.core.executor.Executor`.

    Args:
        payload: what all jobs share (model, task); packed once, in memory shared by all children.
        logs: folder for what the jobs print, `NAME.log` each; None keeps only the last lines.
        environment: variables for the children, for example OMP_NUM_THREADS.
        in_process: run jobs in this process, for models that cannot be packed. Limits do not hold then,
            and a native crash ends the driver; every result carries a note that says so.

    >>> with LocalExecutor({"x": 3}) as executor:  # doctest: +SKIP
    ...     executor.run(lambda payload, say: {"y": 2 * payload["x"]}, limits=Limits(seconds=60)).value
    {'y': 6}

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
        self._packed: IO[bytes] | None = (
            None if in_process else pack(payload, "payload", f"{FIX}, or run with in_process=True")
        )

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
        with pack((_job, (job, args)), f"job {name}") as call:
            child = Child(self._packed, call, self._environment, output)
        return follow(child, limits, say or silent, start)


def _job(payload: Any, channel: Channel, job: Job, args: tuple[Any, ...]) -> dict[str, Any]:
    return job(payload, channel.say, *args)


def _run_here(job: Job, payload: Any, args: tuple[Any, ...], say: Say) -> Finished:
    start = time.monotonic()
    said = attempt(lambda: job(payload, say, *args))
    said["detail"] = last_lines(said.get("detail", ""))
    note = (
        "ran in the driver's process: limits of time and memory do not hold, and a native crash ends the run"
    )
    return Finished.model_validate(said | {"seconds": time.monotonic() - start, "notes": (note,)})
