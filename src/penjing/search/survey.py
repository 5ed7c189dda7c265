"""The first step: look at the original in a process of its own, or say why that cannot be done."""

from __future__ import annotations

import time

from penjing.core.errors import Refused
from penjing.core.executor import Finished, candidate_seed, refused_from
from penjing.core.progress import Line
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
    found = Survey.model_validate(_value(finished))
    return found.model_copy(update={"wall": time.perf_counter() - start})


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
