"""The record of a run: one JSON document, the same for `--json`, for Python and for the report."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import penjing
from penjing.core.artefact import load, open_artefact
from penjing.core.errors import Refused
from penjing.core.files import read_json, write_json
from penjing.core.target import Runner
from penjing.core.trial import Trial
from penjing.core.value import Model, Value
from penjing.core.verdict import Verdict
from penjing.measurement.quality import metric_name
from penjing.planners.forecast import Forecast
from penjing.report.html import write_report
from penjing.run.folder import describe_environment
from penjing.run.reading import read_record
from penjing.search.certification import Judged
from penjing.search.session import Session

SCHEMA = 1
ACTIVITIES = ("training", "evaluation", "export", "measurement", "compression")
"""The work a run exists for; what is left of the wall time is the cost of the tool itself."""


class Result:
    """What a run returns.

    Attributes:
        record: the run as plain data; documented in docs/json.md and stable.
        folder: the run directory.
        verdict: each limit, judged.
        report: path of the HTML report.
    """

    def __init__(self, folder: Path, record: dict[str, Any], model: Model | None = None) -> None:
        self.folder = folder
        self.record = record
        self._model = model

    @property
    def verdict(self) -> Verdict:
        """Return the verdict; printing it shows every limit."""
        return Verdict.model_validate(self.record["verdict"])

    @property
    def artefact(self) -> Path:
        """Return the folder of the delivered model."""
        return self.folder / str(self.record["artefact"]["path"])

    @property
    def report(self) -> Path:
        """Return the path of the HTML report."""
        return self.folder / "report.html"

    def load(self) -> Runner:
        """Load the delivered model into its runtime: a function from NumPy arrays to the output."""
        model = self._model
        return load(self.artefact, None if model is None else lambda: model)

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}, {self.record['verdict']['status']})"


def open_result(folder: Path | str) -> Result:
    """Open a finished run.

    Raises:
        Refused: not a run directory, the run is not finished, or its record is damaged or foreign.
    """
    folder = Path(folder).expanduser().absolute()
    if not (folder / "record.json").is_file():
        raise Refused(
            "the run is finished",
            value=str(folder),
            place="run directory",
            fix=f"resume it with: penjing resume {folder}",
        )
    return Result(folder, read_record(folder))


def write_best(session: Session, candidates: Sequence[Trial]) -> None:
    """Point `best.json` at the fastest candidate that keeps every limit, or at the fastest of all."""
    best = min([t for t in candidates if t.feasible] or candidates, key=lambda t: t.latency_ms or math.inf)
    pointer = {"artefact": _artefact_path(best), "trial": best.key, "certified": False}
    write_json(session.path("best.json"), pointer)


class Spent(Value):
    """Wall time of the run in seconds, by activity; `other` is the cost of the tool itself."""

    seconds: float
    by: dict[str, float]
    trials: int


def finish(
    session: Session,
    facts: dict[str, Any],
    baselines: dict[str, Any],
    plans: Forecast,
    trials: Sequence[Trial],
    judged: Judged,
    probes: tuple[dict[str, Any], dict[str, Any]],
) -> Result:
    """Write record, pointer and report; return the result.

    `probes` holds what the comparisons of runtimes and of precision recipes found.
    """
    runtimes, recipes = probes
    chosen = judged.chosen
    artefact = open_artefact(session.path(_artefact_path(chosen)))
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "penjing": penjing.__version__,
        "name": session.folder.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": {
            "budget": session.budget.model_dump(mode="json"),
            "target": session.target.model_dump(mode="json"),
            "seed": session.seed,
            "metric": metric_name(session.task),
            "class_names": list(session.task.class_names),
        },
        "verdict": judged.verdict.model_dump(mode="json"),
        "artefact": {
            "path": _artefact_path(chosen),
            "sha256": artefact.sha256,
            "files": [file.model_dump(mode="json") for file in artefact.files],
        },
        "forecast": plans.model_dump(mode="json"),
        "baselines": {
            "eager": judged.eager and judged.eager.model_dump(mode="json"),
            "target": judged.baseline.model_dump(mode="json"),
        },
        "runtimes": {name: runtimes[name] for name in ("asked", "chosen", "words", "rows")},
        "recipes": {name: recipes[name] for name in ("words", "rows", "cached")},
        "result": judged.result.model_dump(mode="json"),
        "runners_up": [m.model_dump(mode="json") for m in judged.runners_up],
        "plan": chosen.plan,
        "changes": _changes(session, chosen),
        "ablation": judged.ablation,
        "trials": [_trial(index, trial, trials) for index, trial in enumerate(trials)],
        "environment": describe_environment(),
        "spent": _spent(session, (facts, *probes), baselines, trials, judged).model_dump(mode="json"),
        "notes": [
            *session.task.notes,
            *runtimes["notes"],
            *recipes["notes"],
            *plans.warnings,
            *facts["notes"],
            *baselines["notes"],
            *judged.notes,
        ],
    }
    write_json(
        session.path("best.json"),
        {"artefact": _artefact_path(chosen), "trial": chosen.key, "certified": judged.certified},
    )
    write_report(record, session.path("report.html"))
    write_json(session.path("record.json"), record)
    return Result(session.folder, record, session.model)


def _artefact_path(trial: Trial) -> str:
    return "float/target" if trial.folder == "float" else f"{trial.folder}/artefact"


def _changes(session: Session, chosen: Trial) -> list[Any]:
    return [] if not chosen.plan else list(read_json(session.path(_artefact_path(chosen), "changes.json")))


def _trial(index: int, trial: Trial, trials: Sequence[Trial]) -> dict[str, Any]:
    return {
        "id": index,
        "name": trial.name,
        "plan": trial.plan,
        "status": trial.status,
        "reason": trial.reason or "; ".join(trial.warnings),
        "measurement": trial.measurement and trial.measurement.model_dump(mode="json"),
        "drop": trial.drop,
        "flips": trial.flips,
        "feasible": trial.feasible,
        "breaks": trial.breaks,
        "pareto": pareto(trial, trials),
        "seconds": sum(trial.seconds.values()),
    }


def pareto(trial: Trial, trials: Sequence[Trial]) -> bool:
    """Tell whether no other finished trial is both at least as fast and at least as good."""
    if trial.latency_ms is None or trial.drop is None:
        return False
    mine = (trial.latency_ms, trial.drop)
    others = [(t.latency_ms, t.drop) for t in trials if t.latency_ms is not None and t.drop is not None]
    return not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in others)


def _spent(
    session: Session,
    surveys: tuple[dict[str, Any], ...],
    baselines: dict[str, Any],
    trials: Sequence[Trial],
    judged: Judged,
) -> Spent:
    parts = [
        *(survey["seconds"] for survey in surveys),
        baselines["trial"]["seconds"],
        judged.seconds,
        *(t.seconds for t in trials),
    ]
    by = {name: sum(part.get(name, 0.0) for part in parts) for name in ACTIVITIES}
    seconds = session.elapsed
    return Spent(seconds=seconds, by=by | {"other": max(0.0, seconds - sum(by.values()))}, trials=len(trials))
