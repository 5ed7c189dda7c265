"""Repair of a run directory: what can be read is kept, what cannot is set aside, and the run goes on."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penjing.core.errors import Exit, Refused
from penjing.core.files import read_json, refusing, remove_leftovers
from penjing.core.value import Value
from penjing.run.folder import RunFolder, refuse_links
from penjing.run.ledger import Ledger
from penjing.run.ledger_file import DamagedRows, locate_journal, set_aside
from penjing.run.lock import DriverLock
from penjing.run.reading import find_best, read_record


class Repaired(Value):
    """One file that was not as it should be.

    Attributes:
        file: its name in the run directory.
        fault: what was wrong.
        kept_as: the name that it has now; nothing where there was no file.
        results, events: rows of the ledger that were read and kept.
    """

    file: str
    fault: str
    kept_as: str = ""
    results: int = 0
    events: int = 0


def repair_run(path: Path | str) -> dict[str, Any]:
    """Set aside the files of an interrupted or finished run that are damaged, and keep what can be read.

    Every row of the ledger that still matches its hash comes into a new ledger; what was lost is done again
    when the run is resumed. Damaged pointers and records are written anew by then. Nothing is deleted but
    what a killed writer left under a temporary name.

    Returns:
        `path`, `repaired` (a list of `Repaired` as plain data) and `next`, the command that goes on.

    Raises:
        Refused: no run directory, a process drives it, or the place cannot be written.
    """
    run = RunFolder(Path(path).expanduser().absolute())
    if not run.config.is_file() and not run.ledger.is_file():
        raise Refused(
            "must hold a run",
            value=f"a folder without {run.config.name} and {run.ledger.name}",
            place=str(run.path),
            fix="give the folder that `penjing optimize` named",
            code=Exit.USAGE,
        )
    refuse_links(run)
    with DriverLock(run.lock):
        remove_leftovers(run.path)
        repaired = [
            *_repair_ledger(run),
            *_set_aside(run.best, find_best),
            *_set_aside(run.record, read_record),
        ]
    verb = "report" if run.finished else "resume"
    return {
        "path": str(run.path),
        "repaired": [file.model_dump(mode="json") for file in repaired],
        "next": f"penjing {verb} {shlex.quote(str(run.path))}",
    }


def _set_aside(path: Path, read: Callable[[Path], object]) -> list[Repaired]:
    """Set aside a file of JSON that is there and cannot be read."""
    if not path.exists():
        return []
    try:
        read_json(path)
        read(path.parent)
    except Refused as refused:
        return [Repaired(file=path.name, fault=str(refused), kept_as=set_aside(path).name)]
    return []


def _repair_ledger(run: RunFolder) -> list[Repaired]:
    path = run.ledger
    try:
        with Ledger(path, create=False):
            return []
    except Refused as refused:
        if refused.code == Exit.ENVIRONMENT:
            raise
        fault = str(refused.value)
    if not path.exists():
        Ledger(path).close()
        return [Repaired(file=path.name, fault=fault)]
    with tempfile.TemporaryDirectory(prefix="penjing-") as folder, refusing(path):
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        if locate_journal(path).exists():
            shutil.copyfile(locate_journal(path), locate_journal(copy))
        kept = set_aside(path)
        with Ledger(path) as ledger:
            results, events = _rescue(copy, ledger)
    return [Repaired(file=path.name, fault=fault, kept_as=kept.name, results=results, events=events)]


def _rescue(copy: Path, ledger: Ledger) -> tuple[int, int]:
    """Copy the rows that match their hashes into a new ledger; return how many results and events."""
    rows = DamagedRows(copy)
    try:
        return ledger.restore(rows.results(), rows.events())
    finally:
        rows.close()
