"""The record of a run: one JSON document, the same for `--json`, for Python and for the report."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import penjing
from penjing.core.artefact import open_artefact
from penjing.core.files import read_json, write_json
from penjing.core.method import Change
from penjing.core.target import Target
from penjing.core.trial import Trial
from penjing.measurement.quality import metric_name
from penjing.planners.forecast import Forecast
from penjing.report.html import write_report
from penjing.report.record import ArtefactPlace, Asked, Originals, Record, Spent, TrialRow
from penjing.run.folder import describe_environment
from penjing.search.certification import Judged
from penjing.search.result import Result
from penjing.search.session import Session
from penjing.search.values import Baselines, RecipeChoice, RuntimeChoice, Survey

ACTIVITIES = ("training", "evaluation", "export", "measurement", "compression")
"""The work a run exists for; what is left of the wall time is the cost of the tool itself."""


def write_best(session: Session, candidates: Sequence[Trial]) -> None:
    """Point `best.json` at the fastest candidate that keeps every limit, or at the fastest of all."""
    best = min([t for t in candidates if t.feasible] or candidates, key=lambda t: t.latency_ms or math.inf)
    write_json(session.path("best.json"), _pointer(best, certified=False))


@dataclass(frozen=True)
class Ending:
    """All that a record is made of.

    Attributes:
        survey, baselines, forecast, runtimes, recipes: what the steps before the search found.
        trials: of the search, in their order.
        judged: what is delivered, and what it is worth.
    """

    survey: Survey
    baselines: Baselines
    forecast: Forecast
    runtimes: RuntimeChoice
    recipes: RecipeChoice
    trials: Sequence[Trial]
    judged: Judged


def finish(session: Session, asked: Target, ending: Ending) -> Result:
    """Write record, pointer and report; return the result.

    Args:
        session: of the run.
        asked: the target that the user named, which the session's was chosen for.
        ending: what was found.
    """
    judged = ending.judged
    record = Record(
        penjing=penjing.__version__,
        name=session.folder.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=_asked(session),
        verdict=judged.verdict,
        artefact=_place(session, judged.chosen),
        forecast=ending.forecast,
        baselines=Originals(eager=judged.eager, target=judged.baseline),
        runtimes=ending.runtimes.recorded(asked.label),
        recipes=ending.recipes.recorded(),
        result=judged.result,
        runners_up=list(judged.runners_up),
        plan=judged.chosen.plan,
        changes=_changes(session, judged.chosen),
        ablation=judged.ablation,
        trials=[_row(index, trial, ending.trials) for index, trial in enumerate(ending.trials)],
        environment=describe_environment(),
        spent=_spent(session, ending),
        notes=_notes(session, ending),
    )
    write_json(session.path("best.json"), _pointer(judged.chosen, judged.certified))
    write_report(record, session.path("report.html"))
    write_json(session.path("record.json"), record.to_json())
    return Result(session.folder, record, session.model)


def _asked(session: Session) -> Asked:
    return Asked(
        budget=session.budget.model_dump(mode="json"),
        target=session.target,
        seed=session.seed,
        metric=metric_name(session.task),
        class_names=list(session.task.class_names),
    )


def _place(session: Session, chosen: Trial) -> ArtefactPlace:
    path = _artefact_path(chosen)
    artefact = open_artefact(session.path(path))
    return ArtefactPlace(path=path, sha256=artefact.sha256, files=list(artefact.files))


def _notes(session: Session, ending: Ending) -> list[str]:
    return [
        *session.task.notes,
        *session.notes,
        *ending.runtimes.notes,
        *ending.recipes.notes,
        *ending.forecast.warnings,
        *ending.survey.notes,
        *ending.baselines.notes,
        *ending.judged.notes,
    ]


def _pointer(trial: Trial, certified: bool) -> dict[str, Any]:
    return {"artefact": _artefact_path(trial), "trial": trial.key, "certified": certified}


def _artefact_path(trial: Trial) -> str:
    return "float/target" if trial.folder == "float" else f"{trial.folder}/artefact"


def _changes(session: Session, chosen: Trial) -> list[Change]:
    if not chosen.plan:
        return []
    content = read_json(session.path(_artefact_path(chosen), "changes.json"))
    return [Change.model_validate(change) for change in content]


def _row(index: int, trial: Trial, trials: Sequence[Trial]) -> TrialRow:
    return TrialRow(
        id=index,
        name=trial.name,
        plan=trial.plan,
        status=trial.status,
        reason=trial.reason or "; ".join(trial.warnings),
        measurement=trial.measurement,
        drop=trial.drop,
        flips=trial.flips,
        feasible=trial.feasible,
        breaks=trial.breaks,
        pareto=is_on_front(trial, trials),
        seconds=sum(trial.seconds.values()),
    )


def is_on_front(trial: Trial, trials: Sequence[Trial]) -> bool:
    """Tell whether no other finished trial is both at least as fast and at least as good."""
    if trial.latency_ms is None or trial.drop is None:
        return False
    mine = (trial.latency_ms, trial.drop)
    others = [(t.latency_ms, t.drop) for t in trials if t.latency_ms is not None and t.drop is not None]
    return not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in others)


def _spent(session: Session, ending: Ending) -> Spent:
    parts = [
        ending.survey.seconds,
        ending.runtimes.seconds,
        ending.recipes.seconds,
        ending.baselines.trial.seconds,
        ending.judged.seconds,
        *(trial.seconds for trial in ending.trials),
    ]
    by = {name: sum(part.get(name, 0.0) for part in parts) for name in ACTIVITIES}
    seconds = session.elapsed
    by["other"] = max(0.0, seconds - sum(by.values()))
    return Spent(seconds=seconds, by=by, trials=len(ending.trials))
