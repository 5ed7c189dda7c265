"""What a run returns, and how a finished one is opened again."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from penjing.core.artefact import load
from penjing.core.errors import Refused
from penjing.core.target import Runner
from penjing.core.value import Model
from penjing.core.verdict import Verdict
from penjing.report.record import Record
from penjing.run.reading import find_delivered, read_record


class Result:
    """What a run returns.

    Attributes:
        folder: the run directory.
        typed: the record as a value.
    """

    def __init__(self, folder: Path, record: Record, model: Model | None = None) -> None:
        self.folder = folder
        self.typed = record
        self._model = model

    @cached_property
    def record(self) -> dict[str, Any]:
        """The run as plain data; documented in docs/json.md and stable."""
        return self.typed.to_json()

    @property
    def verdict(self) -> Verdict:
        """Each limit, judged; printing it shows every limit."""
        return self.typed.verdict

    @property
    def artefact(self) -> Path:
        """The folder of the delivered model.

        Raises:
            Refused: another artefact lies there than the record was written for.
        """
        return find_delivered(self.folder, self.typed)

    @property
    def report(self) -> Path:
        """The path of the HTML report."""
        return self.folder / "report.html"

    def load(self) -> Runner:
        """Load the delivered model into its runtime: a function from NumPy arrays to the output."""
        model = self._model
        return load(self.artefact, None if model is None else lambda: model)

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}, {self.verdict.status})"


def open_result(folder: Path | str) -> Result:
    """Open a finished run.

    Raises:
        Refused: not a run directory, the run is not finished, its record is damaged or foreign, or it
            speaks of another artefact than the one that lies there.
    """
    folder = Path(folder).expanduser().absolute()
    if not (folder / "record.json").is_file():
        raise Refused(
            "must be a finished run",
            value="no record.json",
            place=str(folder),
            fix=f"resume it with: penjing resume {folder}",
        )
    result = Result(folder, read_record(folder))
    find_delivered(folder, result.typed)
    return result
