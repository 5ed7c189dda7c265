"""The verbs that look and measure without changing anything: `inspect`, `benchmark`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o

Artefacts = Annotated[
    list[Path] | None, typer.Option("--artefact", help="A delivered folder; may be given several times.")
]


def inspect(task_file: o.TaskPath, json: o.Json = False, seed: o.Seed = 0) -> int:
    """Show layers, operations, what can be pruned or quantized, and what is frozen with the reason."""
    from penjing.cli.main import emit
    from penjing.cli.taskfile import call, load_task_file
    from penjing.diagnostics.inspect import inspect_model

    file = load_task_file(task_file)
    task = call(file.task, file).prepare(seed)
    emit(inspect_model(call(file.model, file), task), json, _show_model)
    return 0


def _show_model(data: dict[str, Any]) -> None:
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


def benchmark(
    task_file: o.TaskPath,
    artefact: Artefacts = None,
    threads: o.Threads = 1,
    batch: o.Batch = 1,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> int:
    """Measure quality, latency, memory and size in every runtime, interleaved."""
    from penjing.cli.main import emit
    from penjing.cli.taskfile import call, load_task_file
    from penjing.diagnostics.benchmark import benchmark as run

    file = load_task_file(task_file)
    task = call(file.task, file).prepare(seed)
    emit(
        run(call(file.model, file), task, artefact or (), threads=threads, batch=batch),
        json,
        _show_measurements,
    )
    return 0


def _show_measurements(data: dict[str, Any]) -> None:
    from penjing.core.measurement import Measurement
    from penjing.report.progress import console
    from penjing.report.terminal import measurement_table

    rows = {name: Measurement.model_validate(row) for name, row in data["rows"].items()}
    measurement_table(rows, console(), title=f"measured on the {data['split']} split, in one interleaved run")


def doctor(json: o.Json = False) -> int:
    """Say what this machine offers and which extras are usable; exit 5 if none is."""
    from penjing.cli.main import emit
    from penjing.diagnostics.doctor import examine

    data = examine()
    emit(data, json, _show_machine)
    return int(data["code"])


def _show_machine(data: dict[str, Any]) -> None:
    for key, value in data["environment"].items():
        typer.echo(f"{key:<12} {value}")
    for name, extra in data["extras"].items():
        typer.echo(f"extra {name:<8} {'usable' if extra['usable'] else extra['reason']}")
    cache = data["cache"]
    held = ", ".join(f"{kind}: {e['files']} files, {e['bytes']} bytes" for kind, e in cache["kinds"].items())
    typer.echo(f"cache        {cache['folder']} ({held or 'empty'})")
    for problem in data["problems"]:
        typer.echo(f"problem      {problem}")
