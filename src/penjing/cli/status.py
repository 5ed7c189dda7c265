"""`penjing status`: what a run has done so far, while it runs or after."""

from __future__ import annotations

from typing import Any

from penjing.cli import options as o


def status(run: o.RunPath, json: o.Json = False) -> int:
    """Show what a run has finished, whether it is running, and its best artefact so far."""
    from penjing.cli.main import emit
    from penjing.run.status import status_of

    emit(status_of(run), json, _show)
    return 0


def _show(data: dict[str, Any]) -> None:
    import typer

    typer.echo(f"run      {data['path']}")
    typer.echo(f"state    {data['state']}")
    typer.echo(f"elapsed  {data['elapsed']:.0f} s")
    for trial in data["trials"]:
        typer.echo(f"trial    {trial['name']}: {trial['words']}")
    typer.echo(f"best     {data['best'] or 'none yet'}")
    if data["next"]:
        typer.echo(f"next     {data['next']}")
