"""How a job ended, and what a run does about it: the machine's faults stop it, they are no candidate's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from penjing.core.errors import Exit, Refused
from penjing.core.executor import Finished, refused_from
from penjing.core.system import system_error, system_fault


def stop_on_fault(finished: Finished, place: str) -> Finished:
    """Return how a job ended, unless the machine is at fault: then the run stops, to be resumed.

    Args:
        finished: of the job.
        place: what the job was for.

    Raises:
        Refused: a full disk, a missing permission or the like (environment).
    """
    if finished.value is not None:
        return finished
    refusal = finished.refusal
    if refusal is not None and refusal.code == Exit.ENVIRONMENT:
        raise refused_from(refusal)
    if finished.fault:
        raise _machine(finished.fault, finished.reason, place) from system_error(finished.fault)
    return finished


@contextmanager
def stopping_on_fault(place: str) -> Iterator[None]:
    """Let no refusal or exception pass for a candidate's that comes from the machine.

    Raises:
        Refused: what was raised, as a fault of the environment where it is one.
    """
    try:
        yield
    except (Refused, OSError) as error:
        if isinstance(error, Refused) and error.code == Exit.ENVIRONMENT:
            raise
        fault = system_fault(error)
        if not fault:
            raise
        raise _machine(fault, str(error), place) from error


def _machine(fault: str, words: str, place: str) -> Refused:
    return Refused(
        "needs a machine with room and permission",
        value=f"{fault}: {words}",
        place=place,
        fix="free space or change permissions, then resume: it is tried again",
        code=Exit.ENVIRONMENT,
    )
