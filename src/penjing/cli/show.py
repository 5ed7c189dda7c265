"""What the command line prints: progress on stderr, results on stdout, codes for scripts."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import typer

from penjing.core.errors import Exit
from penjing.core.progress import Kind, Line

if TYPE_CHECKING:
    from penjing.search.result import Result


class Reporter:
    """Progress lines on stderr: live on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool = False) -> None:
        from penjing.report.progress import Progress

        self._progress = None if quiet else Progress()

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __call__(self, line: Line) -> None:
        """Show a line: what goes on now lives on the bar of a terminal, results stay."""
        if self._progress is None:
            return
        if line.kind is Kind.PHASE:
            self._progress.stage(line.text)
        elif line.kind in (Kind.STEP, Kind.TRAINING):
            self._progress.detail(line.text)
        else:
            self._progress.say(line.text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, trace)


def show_record(result: Result) -> None:
    """Print the final table, the path of the report and how to load the artefact."""
    from penjing.report.progress import console
    from penjing.report.terminal import final_table

    final_table(result.typed, console(), report=result.report)


def exit_code(result: Result) -> int:
    """Return 0 if every limit was reached, else 3."""
    return Exit.DONE if result.verdict.status == "reached" else Exit.BUDGET_NOT_REACHED


def announce(line: str) -> None:
    """Say something on stderr that may quote a foreign string: the file that will run, what was left out."""
    from penjing.report.words import without_controls

    typer.echo(without_controls(line), err=True)
