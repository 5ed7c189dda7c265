"""`penjing tune`: find the strategy that trains the model of a task file in the shortest time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o
from penjing.cli.training import Set, read_strategy, say
from penjing.core.progress import silent

Folder = Annotated[Path, typer.Option("--out", help="Folder of the search.")]
Goal = Annotated[str, typer.Option("--goal", help="The quality to reach on valid, as 'accuracy >= 92%'.")]
Time = Annotated[str, typer.Option("--time", help="Of the whole search, as 20min.")]
Optimizers = Annotated[
    list[str] | None, typer.Option("--optimizer", help="One to try; several times. sgd, adamw, muon.")
]
First = Annotated[int, typer.Option("--first", help="Runs of the first round.", min=3)]


def tune(
    task_file: o.TaskPath,
    goal: Goal,
    time: Time,
    out: Folder,
    optimizer: Optimizers = None,
    first: First = 9,
    settings: Set = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> int:
    """Find the quickest strategy to a quality; the same command goes on after a kill."""
    from penjing.cli.main import emit
    from penjing.cli.taskfile import call, load_task_file
    from penjing.experiments.tune import tune as run

    file = load_task_file(task_file)
    names: Any = optimizer or None  # checked by name in `tune`
    strategy = read_strategy(file, settings)
    tuned = run(
        file.model,
        call(file.task, file),
        goal=goal,
        time=time,
        out=out,
        strategy=strategy,
        optimizers=names,
        first=first,
        seed=seed,
        say=silent if json else say,
    )
    data = tuned.record.model_dump(mode="json") | {
        "report": str(tuned.report),
        "printed": repr(tuned.strategy),
    }
    emit(data, json, _show)
    return 0 if tuned.record.reached else 3


def _show(data: dict[str, Any]) -> None:
    from penjing.report.progress import console

    out = console()
    words = f"reached after {data['seconds']:.1f} s of training" if data["reached"] else "not reached"
    out.print(f"goal {words}, by run {data['best'] + 1} of {len(data['runs'])}")
    out.print(f"{data['metric']} {data['quality']:.4f} on valid, {data['test_quality']:.4f} on unseen test")
    out.print(f"strategy: {data['printed']}", markup=False)
    out.print(f"search: {data['spent_s']:.0f} s")
    out.print(f"report: {data['report']}")
