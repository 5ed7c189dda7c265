"""The second step: measure the original in the target and in eager, which all later figures refer to."""

from __future__ import annotations

import time

from penjing.core.errors import Refused
from penjing.core.plan import plan_name
from penjing.core.progress import Line
from penjing.core.trial import Trial
from penjing.measurement.measure import Measured
from penjing.measurement.quality import reacts
from penjing.search.evaluate import REFERENCE, compare_with_memory, judge_trial, measure_candidates
from penjing.search.expected import read_expected
from penjing.search.session import Session
from penjing.search.values import Baselines, Survey


def measure_baseline(session: Session, survey: Survey) -> Baselines:
    """Measure the float files of the original side by side.

    Raises:
        Refused: the file in the target does not hold the model, or cannot be measured.
    """
    session.say(Line.phase("measuring the original"))
    start = time.perf_counter()
    counts = {REFERENCE: survey.operations, "eager": survey.operations}
    results = measure_candidates(session, {}, counts, "valid", eager=survey.eager)
    mine = results[REFERENCE]
    seconds = {"measurement": time.perf_counter() - start}
    key = session.key("trial", [])
    blank = Trial(key=key, name=plan_name(()), plan=[], status="done", folder="float", seconds=seconds)
    expected = read_expected(session.path("float"))
    deviation = compare_with_memory(mine, expected, survey.noise)
    trial = judge_trial(session, mine, mine, deviation, blank, blank)
    if trial.status == "failed":
        raise Refused(
            "the file must hold the model",
            value=trial.reason,
            place="export",
            fix="report the model's operators; nothing can be certified on a wrong export",
        )
    eager = results["eager"].measurement if "eager" in results else None
    return Baselines(trial=trial, eager=eager, notes=_reaction(session, mine))


def _reaction(session: Session, measured: Measured) -> tuple[str, ...]:
    """Return a note where the metric is the same whatever the outputs are."""
    try:
        note = reacts(session.task, measured.outputs, session.task.valid.arrays()[1])
    except Refused:  # defined on the model's outputs but not on shuffled ones: it reacts
        return ()
    return (note,) if note else ()
