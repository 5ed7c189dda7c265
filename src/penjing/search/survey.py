"""The first step: look at the original in a process of its own, or say why that cannot be done."""

from __future__ import annotations

import shutil
import time

from penjing.core.errors import Refused
from penjing.core.executor import Finished, candidate_seed, refused_from
from penjing.core.progress import Line
from penjing.search.expected import is_whole
from penjing.search.finished import stop_on_fault
from penjing.search.resources import limit_candidate
from penjing.search.session import Session
from penjing.search.survey_job import survey
from penjing.search.values import Survey


def survey_original(session: Session) -> Survey:
    """Return what there is to know of the original; its float files are written on the way.

    Raises:
        Refused: the model cannot be exported, run or trained, with the reason.
    """
    session.say(Line.phase("looking at the model"))
    start = time.perf_counter()
    _clear(session)
    finished = session.executor.run(
        survey,
        session.target,
        session.folder,
        candidate_seed(session.seed, "survey"),
        session.budget.time is not None,
        limits=limit_candidate(session.budget.time),
        name="survey",
        say=session.say,
    )
    found = Survey.model_validate(_value(stop_on_fault(finished, "the survey")))
    return found.model_copy(update={"wall": time.perf_counter() - start})


def is_surveyed(session: Session) -> bool:
    """Tell whether the float files that a survey writes are there; after a power cut they may not be."""
    return is_whole(session.path("float"), "target")


def _clear(session: Session) -> None:
    """Remove what a survey that was stopped has written: a folder is made once, and whole."""
    for name in ("target", "eager"):
        shutil.rmtree(session.path("float", name), ignore_errors=True)


def _value(finished: Finished) -> object:
    """Return what a job that must succeed returned; raise what went wrong."""
    if finished.value is not None:
        return finished.value
    if finished.refusal is not None:
        raise refused_from(finished.refusal)
    raise Refused(
        "the model must go through export, evaluation and a few training steps",
        value=f"{finished.status}: {finished.reason} {finished.detail}".rstrip(),
        place="survey",
        fix=f"read {finished.log}" if finished.log else "run the model once by hand on a batch of valid",
    )
