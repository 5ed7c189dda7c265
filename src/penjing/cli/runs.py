"""The verbs that take run directories: `resume`, `status`, `report`, `compare`."""

from __future__ import annotations

from typing import Any

import typer

from penjing.cli import options as o


def resume(run: o.RunPath, json: o.Json = False) -> int:
    """Go on with an interrupted run; nothing finished is repeated."""
    from penjing.cli.main import emit
    from penjing.cli.optimize import run_task_file
    from penjing.cli.show import exit_code, show_record
    from penjing.core.errors import Refused
    from penjing.run.folder import open_run
    from penjing.run.reading import read_settings
    from penjing.search.result import open_result

    folder = open_run(run)
    if (folder.path / "record.json").is_file():
        result = open_result(folder.path)
        emit(result.record, json, lambda _: show_record(result))
        return exit_code(result)
    path, budget, target, seed = read_settings(folder)
    if path is None:
        raise Refused(
            "must have been started from a task file",
            value="a run started from Python",
            place=str(folder.path),
            fix="call pj.optimize again with the same arguments and out=",
        )
    return run_task_file(path, budget, target, folder.path, seed, json=json)


def status(run: o.RunPath, json: o.Json = False) -> int:
    """Show what a run has finished, whether it is running, and its best artefact so far."""
    from penjing.cli.main import emit
    from penjing.run.status import read_status

    emit(read_status(run), json, _show_status)
    return 0


def _show_status(data: dict[str, Any]) -> None:
    typer.echo(f"run      {data['path']}")
    typer.echo(f"state    {data['state']}")
    typer.echo(f"elapsed  {data['elapsed']:.0f} s")
    for trial in data["trials"]:
        typer.echo(f"trial    {trial['name']}: {trial['words']}")
    typer.echo(f"best     {data['best'] or 'none yet'}")
    if data["next"]:
        typer.echo(f"next     {data['next']}")


def report(run: o.RunPath, json: o.Json = False) -> int:
    """Print the table of a finished run and write its HTML report anew."""
    from penjing.cli.main import emit
    from penjing.cli.show import show_record
    from penjing.report.html import write_report
    from penjing.search.result import open_result

    result = open_result(run)
    write_report(result.typed, result.report)
    emit(result.record, json, lambda _: show_record(result))
    return 0


def compare(first: o.RunPath, second: o.RunPath, json: o.Json = False) -> int:
    """Put the delivered results of two finished runs beside each other."""
    from penjing.cli.main import emit
    from penjing.search.compare import compare_runs

    emit(compare_runs(first, second), json, _show_comparison)
    return 0


def _show_comparison(data: dict[str, Any]) -> None:
    from rich.table import Table

    from penjing.report.progress import console
    from penjing.report.words import clean

    table = Table(title="results on the unseen data of each run")
    for head in ("", clean(data["first"]), clean(data["second"]), "second against first"):
        table.add_column(head, justify="left" if not head else "right")
    for row in data["rows"]:
        table.add_row(row["name"], row["first"], row["second"], row["words"])
    console().print(table)
    for note in data["notes"]:
        typer.echo(f"note: {note}")
