"""Read back what a run wrote; the folder may be damaged, or a stranger's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from penjing.core.budget import Budget
from penjing.core.errors import Refused
from penjing.core.files import MANIFEST, read_json, sha256_file
from penjing.core.target import Target
from penjing.report.record import Record, check_schema
from penjing.run.folder import RunFolder, read_config

Plain = dict[str, Any]


class Settings(BaseModel):
    """What a run was asked, as far as going on with it needs it."""

    task_file: str | None = None
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


@dataclass(frozen=True)
class Asked:
    """What a run was asked.

    Attributes:
        task_file: the name of the task file as the run has it, which may be anything; None for a run that was
            started from Python.
        budget, target, seed: of the run.
    """

    task_file: str | None
    budget: Budget
    target: Target
    seed: int


def read_settings(run: RunFolder) -> Asked:
    """Return what a run was asked, as its configuration says.

    Raises:
        Refused: the configuration is of another form.
    """
    try:
        settings = Settings.model_validate(read_config(run))
        budget, target = Budget(**settings.budget), Target(**settings.target)
    except (ValidationError, TypeError, Refused) as error:
        raise _foreign(run.config, error) from error
    return Asked(settings.task_file, budget, target, settings.seed)


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
