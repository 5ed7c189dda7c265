"""The protocol that carries candidates out, here or elsewhere, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal, Protocol

from pydantic import Field

from penjing.core.errors import Exit, Refused
from penjing.core.progress import Say
from penjing.core.system import system_error, system_fault
from penjing.core.value import Value

Job = Callable[..., dict[str, Any]]
"""`job(payload, say, *args)` returns plain data; `payload` is what all jobs of a run share."""


class Limits(Value):
    """What one job may spend.

    Attributes:
        seconds: of wall time; None for no limit.
        memory_bytes: resident memory of the job with its children; None for no limit.
        grace_s: seconds between asking a job to end and killing it.

    >>> Limits(seconds=60, memory_bytes=2 * 10**9).grace_s
    5.0
    """

    seconds: float | None = Field(default=None, gt=0)
    memory_bytes: int | None = Field(default=None, gt=0)
    grace_s: float = Field(default=5.0, ge=0)


class Refusal(Value):
    """A `Refused` as data; `fault` names the system's error that it comes from."""

    rule: str
    value: str | None = None
    place: str = ""
    fix: str = ""
    code: int = int(Exit.BAD_INPUT)
    fault: str = ""


class Finished(Value):
    """How a job ended.

    Attributes:
        status: `done`; `refused` (it raised `Refused`); `crashed` (another exception, a native crash, an
            exit without a result); `killed` (a signal from outside, or the memory limit); `timeout`.
        value: what the job returned; None unless done.
        reason: one line for people; empty when done.
        fault: the system's error that the end comes from (`ENOSPC`, `EACCES`, `EMFILE` and the like, see
            `penjing.core.system`); empty where the machine is not at fault. Such a job is no worse than
            before: it may be tried again once there is room, or a permission.
        detail: the last lines of a traceback or of the log.
        peak_bytes: the largest resident memory seen; None where not measured.
        seconds: wall time, by a monotonic clock.
        log: path of the file with the job's output, if one is kept.
    """

    status: Literal["done", "refused", "crashed", "killed", "timeout"]
    value: dict[str, Any] | None = None
    reason: str = ""
    fault: str = ""
    detail: str = ""
    refusal: Refusal | None = None
    peak_bytes: int | None = None
    seconds: float
    log: str | None = None
    notes: tuple[str, ...] = ()


class Executor(Protocol):
    """Runs jobs so that none of them can harm the driver."""

    def run(
        self, job: Job, *args: Any, limits: Limits, name: str = "job", say: Say | None = None
    ) -> Finished:
        """Run `job(payload, say, *args)` to its end; `say` gets the job's lines of progress as they come."""


def refusal_of(error: Refused) -> Refusal:
    """Return a refusal as data."""
    value = None if error.value is None else str(error.value)
    return Refusal(
        rule=error.rule,
        value=value,
        place=error.place,
        fix=error.fix,
        code=int(error.code),
        fault=system_fault(error),
    )


def refused_from(refusal: Refusal) -> Refused:
    """Rebuild the exception that `refusal_of` wrote down."""
    error = Refused(
        refusal.rule, value=refusal.value, place=refusal.place, fix=refusal.fix, code=Exit(refusal.code)
    )
    error.__cause__ = system_error(refusal.fault) if refusal.fault else None
    return error


def candidate_seed(seed: int, key: str) -> int:
    """Return the seed of one candidate, from the run's seed and the candidate's key.

    The number of workers, the order and a resumption do not change it.

    >>> candidate_seed(0, "plan-1") == candidate_seed(0, "plan-1") != candidate_seed(1, "plan-1")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4], "big")
