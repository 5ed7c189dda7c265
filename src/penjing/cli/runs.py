"""The verbs that take run directories: `resume`, `repair`, `status`, `report`, `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o

SHOWN_TRIALS = 20
"""How many of the last trials `status` prints; `--json` has all."""
ReportFile = Annotated[
    Path | None, typer.Option("--out", help="The HTML file; report.html in the run directory by default.")
]


def resume(run: o.RunPath, task: o.RunTask = None, json: o.Json = False) -> int:
    """Go on with an interrupted run; nothing finished is repeated."""
    from penjing.cli.main import emit
    from penjing.cli.optimize import run_task_file
    from penjing.cli.show import announce, exit_code, show_record
    from penjing.run.code import locate_task_file
    from penjing.run.folder import open_run
    from penjing.run.reading import read_settings
    from penjing.search.result import open_result

    folder = open_run(run)
    if folder.finished:
        result = open_result(folder.path)
        emit(result.record, json, lambda _: show_record(result))
        return exit_code(result)
    asked = read_settings(folder)
    path = task or locate_task_file(folder, asked.task_file, "resume")
    told = None if task else announce
    return run_task_file(path, asked.budget, asked.target, folder.path, asked.seed, json=json, announce=told)


def repair(run: o.RunPath, json: o.Json = False) -> int:
    """Set aside what is damaged in a run directory, keep what can be read, and say how to go on."""
    from penjing.cli.main import emit
    from penjing.run.repair import repair_run

    emit(repair_run(run), json, _show_repair)
    return 0


def _show_repair(data: dict[str, Any]) -> None:
    for file in data["repaired"]:
        typer.echo(f"{file['file']}: {file['fault']}")
        if file["kept_as"]:
            typer.echo(f"  the old file is kept as {file['kept_as']}")
        if file["file"].startswith("ledger"):
            typer.echo(f"  {file['results']} results and {file['events']} events could be read and are kept")
    if not data["repaired"]:
        typer.echo("nothing is damaged")
    typer.echo(f"next     {data['next']}")


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
    trials = data["trials"]
    if len(trials) > SHOWN_TRIALS:
        failed = sum(trial["status"] == "failed" for trial in trials)
        typer.echo(f"trials   {len(trials):,}, of which {failed:,} failed; the last {SHOWN_TRIALS}:")
    for trial in trials[-SHOWN_TRIALS:]:
        typer.echo(f"trial    {trial['name']}: {trial['words']}")
    typer.echo(f"best     {data['best'] or 'none yet'}")
    if data["next"]:
        typer.echo(f"next     {data['next']}")


def report(run: o.RunPath, out: ReportFile = None, json: o.Json = False) -> int:
    """Print the table of a finished run and write its HTML report anew."""
    from penjing.cli.main import emit
    from penjing.cli.show import announce, show_record
    from penjing.core.errors import Exit, Refused
    from penjing.report.html import write_report
    from penjing.search.result import open_result

    result = open_result(run)
    try:
        write_report(result.typed, out or result.report)
    except Refused as refused:
        if out is not None or refused.code != Exit.ENVIRONMENT:
            raise
        announce(f"the report was not written anew, --out FILE puts it elsewhere: {refused}")
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
