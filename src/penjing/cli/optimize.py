"""The verbs of the main job: `optimize` from a task file, `demo` on data that the packages carry."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.cli import options as o

if TYPE_CHECKING:
    from penjing.core.budget import Budget
    from penjing.core.target import Target

DEMO_BUDGET = {"max_drop": "5%", "latency": "80%", "size": "60%"}
"""What so small a test split can certify."""
DemoTime = Annotated[str, typer.Option("--time", help="What the whole run may take.")]


def optimize(
    task_file: o.TaskPath,
    max_drop: o.MaxDrop = None,
    latency: o.Latency = None,
    size: o.Size = None,
    memory: o.Memory = None,
    operations: o.Operations = None,
    time: o.Time = None,
    trials: o.Trials = None,
    confidence: o.Confidence = "95%",
    target: o.Runtime = "onnxruntime",
    threads: o.Threads = 1,
    batch: o.Batch = 1,
    out: o.Out = None,
    seed: o.Seed = 0,
    json: o.Json = False,
    dry_run: o.DryRun = False,
) -> int:
    """Find the fastest artefact that keeps to the budget, and certify it on unseen data."""
    budget = o.make_budget(
        confidence,
        max_drop=max_drop,
        latency=latency,
        size=size,
        memory=memory,
        operations=operations,
        time=time,
        trials=trials,
    )
    where = o.make_target(target, threads, batch)
    return run_task_file(task_file, budget, where, out, seed, json=json, dry_run=dry_run)


def run_task_file(
    path: Path,
    budget: Budget,
    target: Target,
    out: Path | None,
    seed: int,
    *,
    json: bool = False,
    dry_run: bool = False,
    announce: Callable[[str], None] | None = None,
) -> int:
    """Optimize what a task file offers; print the table or the JSON; return the exit code.

    `announce` is told which file will run, where the user did not name it.
    """
    from penjing.cli.main import emit
    from penjing.cli.show import Reporter, exit_code, show_record
    from penjing.cli.taskfile import call, load_task_file
    from penjing.search.open_session import check_budget
    from penjing.search.optimize import optimize as run

    check_budget(budget)
    file = load_task_file(path, announce)
    config = {
        "task_file": str(file.path),
        "task_sha256": file.sha256,
        "budget": budget.model_dump(mode="json"),
        "target": target.model_dump(mode="json"),
        "seed": seed,
    }
    task = call(file.task, file).prepare(seed)
    if dry_run:
        emit(_dry(task, config), json, _say_dry)
        return 0
    with Reporter(quiet=json) as reporter:
        result = run(
            call(file.model, file),
            task,
            budget,
            target=target,
            out=out,
            seed=seed,
            say=reporter,
            name=file.path.stem,
            config=config,
        )
    emit(result.record, json, lambda _: show_record(result))
    return exit_code(result)


def _dry(task: Any, config: dict[str, Any]) -> dict[str, Any]:
    counts = {name: _length(getattr(task, name)) for name in ("train", "valid", "test")}
    return config | {"examples": counts, "notes": list(task.notes), "dry_run": True}


def _length(split: Any) -> int | None:
    try:
        return len(split)
    except TypeError:
        return None


def _say_dry(data: dict[str, Any]) -> None:
    from penjing.core.budget import Budget

    typer.echo(f"task file  {data['task_file']}")
    typer.echo(f"budget     {Budget(**data['budget'])}")
    for name, examples in data["examples"].items():
        typer.echo(f"{name:<10} {examples if examples is not None else 'unknown number of'} examples")
    for note in data["notes"]:
        typer.echo(f"note       {note}")
    typer.echo("dry run: nothing was started")


def demo(
    out: o.Out = None,
    time: DemoTime = "90s",
    seed: o.Seed = 0,
    json: o.Json = False,
    dry_run: o.DryRun = False,
) -> int:
    """Train a small network on handwritten digits, optimize it under a budget and certify the result."""
    from penjing.core.budget import Budget
    from penjing.core.extras import need
    from penjing.core.target import Target

    for extra in ("torch", "onnx", "metrics"):
        need(extra, "the demo")
    folder = Path("runs/demo") if out is None else out.expanduser()
    path = _demo_task(folder.absolute())
    run = next(folder.absolute() / f"run-{n}" for n in count(1) if not (folder / f"run-{n}").exists())
    budget = Budget(**DEMO_BUDGET, time=time)
    return run_task_file(path, budget, Target(), run, seed, json=json, dry_run=dry_run)


def _demo_task(folder: Path) -> Path:
    """Copy the demo's task file into the folder, so that the user can read, change and run it."""
    from importlib.resources import files

    from penjing.core.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "task.py"
    write_text(path, files("penjing.examples").joinpath("digits.py").read_text(encoding="utf-8"))
    return path
