"""Read back what a run wrote; the folder may be damaged, or a stranger's."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from penjing.core.budget import Budget
from penjing.core.errors import Exit, Refused
from penjing.core.files import MANIFEST, read_json, sha256_file
from penjing.core.target import Target
from penjing.report.record import Record, check_schema
from penjing.run.folder import RunFolder, read_config

Plain = dict[str, Any]


class Settings(BaseModel):
    """What a run was asked, as far as going on with it needs it."""

    task_file: Path | None = None
    budget: Plain
    target: Plain
    seed: int = Field(ge=0)


def read_record(folder: Path) -> Record:
    """Return a run's record after a check of its form.

    Raises:
        Refused: no JSON, of another form or a newer schema, or its artefact lies outside the run.
    """
    path = folder / "record.json"
    content = read_json(path)
    check_schema(content)
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        raise _foreign(path, error) from error
    locate_artefact(folder, record.artefact.path)
    return record


def find_delivered(folder: Path, record: Record) -> Path:
    """Return the folder of the artefact that a record speaks of.

    Raises:
        Refused: another artefact lies there: its manifest has another hash than the record says.
    """
    path = locate_artefact(folder, record.artefact.path)
    manifest = path / MANIFEST
    found = sha256_file(manifest) if manifest.is_file() else "no manifest"
    if found != record.artefact.sha256:
        raise Refused(
            "must be the artefact that the record was written for",
            value=f"{found[:12]}, where the record says {record.artefact.sha256[:12]}",
            place=str(path),
            fix="put back the folder that the run delivered; every figure of the record is of that one",
        )
    return path


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

    >>> locate_artefact(Path("runs/mine"), "artefacts/a/artefact").as_posix()
    'runs/mine/artefacts/a/artefact'
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
