"""`penjing fit`: train the model of a task file by a strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o
from penjing.cli.training import Set, read_strategy, say
from penjing.core.progress import silent

Folder = Annotated[Path, typer.Option("--out", help="Folder of the record, the weights and the state.")]
Goal = Annotated[str | None, typer.Option("--goal", help="Where training ends, as 'accuracy >= 92%'.")]


def fit(
    task_file: o.TaskPath,
    out: Folder,
    goal: Goal = None,
    settings: Set = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> int:
    """Train by a strategy; the same command goes on after a kill."""
    from penjing.cli.main import emit
    from penjing.cli.taskfile import call, load_task_file
    from penjing.experiments.fit import fit as run
    from penjing.train.distributed import find_processes

    file = load_task_file(task_file)
    strategy = read_strategy(file, settings)
    fitted = run(
        call(file.model, file),
        call(file.task, file),
        strategy,
        goal=goal,
        seed=seed,
        out=out,
        say=silent if json else say,
    )
    if find_processes().is_main:
        emit(fitted.record.model_dump(mode="json") | {"folder": str(fitted.folder)}, json, _show)
    return 0 if goal is None or fitted.record.reached is not None else 3


def _show(data: dict[str, Any]) -> None:
    from penjing.core.budget import say as in_words
    from penjing.report.progress import console

    out, reached = console(), data["reached"]
    if data["goal"] is not None:
        words = "not reached" if reached is None else f"reached after {reached['seconds']:.1f} s of training"
        out.print(f"goal {words}")
    energy = "not measured" if data["energy_j"] is None else f"{data['energy_j']:.0f} J"
    rows = (
        (data["metric"], f"{data['quality']:.4f} on valid"),
        (
            "time",
            f"{in_words(data['seconds'], 's')}, {data['evaluation_seconds']:.1f} s of it to evaluate",
        ),
        ("speed", f"{data['samples_per_s']:.0f} examples a second"),
        ("work", f"{in_words(data['multiply_adds'], 'count')} multiply-adds in {data['steps']} steps"),
        ("peak memory", in_words(data["peak_memory_bytes"], "bytes")),
        ("energy", energy),
    )
    for name, text in rows:
        out.print(f"{name:<12} {text}")
    for event in data["events"]:
        out.print(f"event: {event}")
    out.print(f"weights and record: {data['folder']}")
