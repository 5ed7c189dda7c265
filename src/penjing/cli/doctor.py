"""`penjing doctor`: versions, cores, and which parts of Penjing can be used here."""

from __future__ import annotations

from typing import Any

from penjing.cli import options as o


def doctor(json: o.Json = False) -> int:
    """Say what this machine offers and which extras are usable; exit 5 if none is."""
    from penjing.cli.main import emit
    from penjing.diagnostics.doctor import examine

    data = examine()
    emit(data, json, _show)
    return int(data["code"])


def _show(data: dict[str, Any]) -> None:
    import typer

    for key, value in data["environment"].items():
        typer.echo(f"{key:<12} {value}")
    for name, extra in data["extras"].items():
        typer.echo(f"extra {name:<8} {'usable' if extra['usable'] else extra['reason']}")
    cache = data["cache"]
    held = ", ".join(f"{kind}: {e['files']} files, {e['bytes']} bytes" for kind, e in cache["kinds"].items())
    typer.echo(f"cache        {cache['folder']} ({held or 'empty'})")
    for problem in data["problems"]:
        typer.echo(f"problem      {problem}")
