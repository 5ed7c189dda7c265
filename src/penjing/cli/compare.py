"""`penjing compare`: two finished runs beside each other."""

from __future__ import annotations

from typing import Any

import typer

from penjing.cli import options as o


def compare(first: o.RunPath, second: o.RunPath, json: o.Json = False) -> int:
    """Put the delivered results of two finished runs beside each other."""
    from penjing.cli.main import emit
    from penjing.search.compare import compare_runs

    emit(compare_runs(first, second), json, _show)
    return 0


def _show(data: dict[str, Any]) -> None:
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
