"""`penjing stability`: how much the result of training depends on chance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o
from penjing.cli.training import Set, read_strategy, say
from penjing.core.progress import silent

Folder = Annotated[Path, typer.Option("--out", help="Folder of the runs.")]
Seeds = Annotated[int, typer.Option("--seeds", help="How many runs.", min=2)]
Fresh = Annotated[bool, typer.Option("--fresh-splits", help="Divide train and valid anew for each seed.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Runs side by side.", min=1)]


def stability(
    task_file: o.TaskPath,
    out: Folder,
    seeds: Seeds = 5,
    fresh_splits: Fresh = False,
    workers: Workers = None,
    settings: Set = None,
    json: o.Json = False,
) -> int:
    """Train with several seeds and report mean, spread, worst case, flips and corrupted inputs."""
    from penjing.cli.main import emit
    from penjing.cli.taskfile import call, load_task_file
    from penjing.experiments.stability import stability as run

    file = load_task_file(task_file)
    strategy = read_strategy(file, settings)
    found = run(
        (file.model, strategy),
        call(file.task, file),
        seeds=seeds,
        splits="fresh" if fresh_splits else "fixed",
        out=out,
        workers=workers,
        say=silent if json else say,
    )
    emit(found.model_dump(mode="json"), json, _show)
    return 0


def _show(data: dict[str, Any]) -> None:
    from rich.table import Table

    from penjing.report.progress import console

    out = console()
    for name, task in data["tasks"].items():
        table = Table("", task["metric"], "worst seed", title=f"{name}, {len(data['seeds'])} seeds", box=None)
        interval = f"{task['mean']:.4f} ({task['low']:.4f} to {task['high']:.4f})"
        table.add_row("test, mean (95%)", interval, f"{task['worst']:.4f}")
        for kind, (mean, worst) in task["corrupted"].items():
            table.add_row(f"with {kind}", f"{mean:.4f}", f"{worst:.4f}")
        out.print(table)
        out.print(f"standard deviation over seeds {task['spread']:.4f}{_explained(task)}", soft_wrap=True)
        if task["flips"] is not None:
            out.print(f"two runs differ on {100 * task['flips']:.2f}% of the examples")
        if task["unstable"]:
            out.print("unstable: " + _reason(task), soft_wrap=True)
    for event in data["events"]:
        out.print(f"event: {event}", soft_wrap=True)


def _explained(task: dict[str, Any]) -> str:
    sampling = task["sampling"]
    return "" if sampling is None else f"; test examples alone explain {sampling:.4f}"


def _reason(task: dict[str, Any]) -> str:
    lost = sum(value is None for value in task["values"])
    if lost:
        return f"training gave no model with {lost} of {len(task['values'])} seeds"
    return "seeds differ by more than test examples explain, and by more than a tenth of the error"
