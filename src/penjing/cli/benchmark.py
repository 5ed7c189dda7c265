"""`penjing benchmark`: a model in every runtime there is, and artefacts beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o

Artefacts = Annotated[
    list[Path] | None, typer.Option("--artefact", help="A delivered folder; may be given several times.")
]


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
    emit(run(call(file.model, file), task, artefact or (), threads=threads, batch=batch), json, _show)
    return 0


def _show(data: dict[str, Any]) -> None:
    from penjing.core.measurement import Measurement
    from penjing.report.progress import console
    from penjing.report.terminal import measurement_table

    rows = {name: Measurement.model_validate(row) for name, row in data["rows"].items()}
    measurement_table(rows, console(), title=f"measured on the {data['split']} split, in one interleaved run")
