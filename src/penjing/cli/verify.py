"""`penjing verify`: judge a delivered artefact again, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o

TaskFile = Annotated[
    Path | None, typer.Option("--task", help="The task file; by default the one the run was started from.")
]


def verify(
    run: o.RunPath,
    task: TaskFile = None,
    max_drop: o.MaxDrop = None,
    latency: o.Latency = None,
    size: o.Size = None,
    memory: o.Memory = None,
    operations: o.Operations = None,
    confidence: o.Confidence = "95%",
    json: o.Json = False,
) -> int:
    """Check every hash, load the artefact in a fresh process and judge it again on the unseen data.

    Without limits those of the run are used.
    """
    from penjing.cli.main import emit
    from penjing.cli.taskfile import call, load_task_file
    from penjing.core.errors import Exit, Refused
    from penjing.run.folder import open_run
    from penjing.run.reading import read_settings
    from penjing.search.verify import verify as judge

    path, asked, target, seed = read_settings(open_run(run), task)
    given = {
        "max_drop": max_drop,
        "latency": latency,
        "size": size,
        "memory": memory,
        "operations": operations,
    }
    chosen = any(value is not None for value in given.values())
    budget = o.make_budget(confidence, **given) if chosen else asked
    if path is None:
        raise Refused(
            "needs a task file for its data",
            value="a run that was started from Python",
            place=str(run),
            fix="give one with --task TASK.py",
            code=Exit.USAGE,
        )
    file = load_task_file(path)
    data = call(file.task, file).prepare(seed)
    model = call(file.model, file) if "torch" in (target.runtime, target.mode) else None
    result = judge(run, data, budget, model=model)
    emit(result.model_dump(mode="json"), json, lambda _: _show(result))
    return int(Exit.DONE if result.status == "reached" else Exit.BUDGET_NOT_REACHED)


def _show(result: Any) -> None:
    typer.echo(str(result))
