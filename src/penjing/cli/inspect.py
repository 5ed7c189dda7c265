"""`penjing inspect`: what a model is made of and what could be done to it."""

from __future__ import annotations

from typing import Any

from penjing.cli import options as o


def inspect(task_file: o.TaskPath, json: o.Json = False, seed: o.Seed = 0) -> int:
    """Show layers, operations, what can be pruned or quantized, and what is frozen with the reason."""
    from penjing.cli.main import emit
    from penjing.cli.taskfile import call, load_task_file
    from penjing.diagnostics.inspect import inspect_model

    file = load_task_file(task_file)
    task = call(file.task, file).prepare(seed)
    emit(inspect_model(call(file.model, file), task), json, _show)
    return 0


def _show(data: dict[str, Any]) -> None:
    import typer
    from rich.table import Table

    from penjing.report.progress import console
    from penjing.report.words import clean

    table = Table(
        title=f"{data['parameters']:,} parameters, {data['multiply_adds']:,} multiply-adds an example"
    )
    for head in ("layer", "kind", "weights", "channels can go", "why not"):
        table.add_column(head)
    for layer in data["layers"]:
        shape = " × ".join(map(str, layer["shapes"].get("weight", [])))
        table.add_row(
            clean(layer["name"]),
            layer["kind"],
            shape,
            "yes" if layer["group"] else "no",
            clean(layer["frozen"]),
        )
    console().print(table)
    if data["uncounted"]:
        typer.echo(f"not counted: {', '.join(data['uncounted'])} (the multiply-adds are a lower bound)")
    if data["whole"]:
        typer.echo(f"no channels can go: {data['whole']}")
    typer.echo(f"methods: {', '.join(data['methods'])}")
