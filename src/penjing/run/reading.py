"""Read back what a run wrote; the folder may be damaged, or a stranger's."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from penjing.core.artefact import ArtefactFile
from penjing.core.budget import Budget
from penjing.core.errors import Exit, Refused
from penjing.core.files import read_json
from penjing.core.measurement import Measurement
from penjing.core.method import Change
from penjing.core.target import Target
from penjing.core.verdict import Verdict
from penjing.planners.candidates import Probed
from penjing.report.view import check
from penjing.run.folder import RunFolder, read_config

Plain = dict[str, Any]


class TrialRow(BaseModel):
    """A trial as the record lists it."""

    id: int
    name: str
    plan: list[Plain]
    status: Literal["done", "failed"]
    reason: str
    measurement: Measurement | None
    drop: float | None
    flips: float | None
    feasible: bool
    breaks: dict[str, float]
    pareto: bool
    seconds: float


class StepRow(BaseModel):
    """A row of the ablation."""

    step: str
    quality: Plain
    latency_ms: float | None
    low: float | None
    high: float | None
    size_bytes: int | None
    operations: Plain | None


class Place(BaseModel):
    """Where the delivered model lies, with the SHA-256 of its manifest."""

    path: str
    sha256: str
    files: list[ArtefactFile]


class RuntimeRow(BaseModel):
    """The float model in one of the runtimes that were compared."""

    measurement: Measurement | None
    drop: float | None
    flips: float | None
    status: Literal["done", "failed"]
    reason: str


class Runtimes(BaseModel):
    """The runtimes that were compared before the search, if any."""

    asked: str = ""
    chosen: str = ""
    words: list[str] = Field(default_factory=list)
    rows: dict[str, RuntimeRow] = Field(default_factory=dict)


class Recipes(BaseModel):
    """The precision recipes whose latency was measured before the search, if any."""

    words: list[str] = Field(default_factory=list)
    rows: list[Probed] = Field(default_factory=list)
    cached: bool = False


class Asked(BaseModel):
    """What the run was asked."""

    budget: Plain
    target: Target
    seed: int
    metric: str
    class_names: list[str]


class Record(BaseModel):
    """The form of `record.json`, as docs/json.md describes it; used to check, never to hold."""

    verdict: Verdict
    artefact: Place
    baselines: dict[str, Measurement | None]
    runtimes: Runtimes = Field(default_factory=Runtimes)
    recipes: Recipes = Field(default_factory=Recipes)
    result: Measurement
    runners_up: list[Measurement]
    config: Asked
    plan: list[Plain]
    changes: list[Change]
    ablation: list[StepRow]
    trials: list[TrialRow]
    environment: Plain
    spent: Plain
    notes: list[str]


class Settings(BaseModel):
    """What a run was asked, as far as going on with it needs it."""

    task_file: Path | None = None
    budget: Plain
    target: Plain
    seed: int = Field(ge=0)


def read_record(folder: Path) -> Plain:
    """Return a run's record after a check of its form.

    Raises:
        Refused: no JSON, of another form or a newer schema, or its artefact lies outside the run.
    """
    path = folder / "record.json"
    record = read_json(path)
    check(record)
    try:
        form = Record.model_validate(record)
    except ValidationError as error:
        raise _foreign(path, error) from error
    locate_artefact(folder, form.artefact.path)
    checked: Plain = record
    return checked


def find_best(folder: Path) -> Path:
    """Return the folder of the best artefact so far, which `best.json` names.

    Raises:
        Refused: the file is of another form, or names a place outside the run.
    """
    content = read_json(folder / "best.json")
    if not isinstance(content, dict) or not isinstance(content.get("artefact"), str):
        raise Refused(
            "must name an artefact",
            value=str(content)[:80],
            place=str(folder / "best.json"),
            fix="restore the file from a copy",
        )
    return locate_artefact(folder, content["artefact"])


def locate_artefact(folder: Path, name: str) -> Path:
    """Return the path of an artefact by its name in the run.

    Raises:
        Refused: the name leads out of the run directory.
    """
    pure = PurePosixPath(name)
    inside = (folder / pure).resolve().is_relative_to(folder.resolve())
    if pure.is_absolute() or ".." in pure.parts or not inside:
        raise Refused(
            "an artefact must lie inside its run directory",
            value=name,
            place=str(folder),
            fix="restore best.json and record.json from a copy; do not edit them",
        )
    return folder / pure


def read_settings(run: RunFolder, task: Path | None = None) -> tuple[Path | None, Budget, Target, int]:
    """Return task file, budget, target and seed of a run.

    Args:
        run: the run directory.
        task: the user's own task file, instead of the one that the run names.

    Raises:
        Refused: the configuration is of another form, or names code that came with the folder: a run
            directory that somebody sent must not run a program.
    """
    try:
        settings = Settings.model_validate(read_config(run))
        budget, target = Budget(**settings.budget), Target(**settings.target)
    except (ValidationError, TypeError, Refused) as error:
        raise _foreign(run.config, error) from error
    path = settings.task_file if task is None else task
    if task is None and path is not None and path.resolve().is_relative_to(run.path.resolve()):
        raise Refused(
            "a run directory cannot carry the code that goes on with it",
            value=str(path),
            place=str(run.config),
            fix="read that file, and copy it out of the folder if you trust it: "
            "penjing optimize TASK.py with the same budget and --out goes on",
            code=Exit.USAGE,
        )
    return path, budget, target, settings.seed


def _foreign(path: Path, error: Exception) -> Refused:
    words = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        words = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return Refused(
        "must have the form that Penjing writes",
        value=words,
        place=str(path),
        fix="restore the file from a copy",
    )
