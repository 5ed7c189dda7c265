"""`penjing verify`: judge a delivered artefact again, from its files."""

from __future__ import annotations

from typing import Any

import typer

from penjing.cli import options as o


def verify(
    run: o.RunPath,
    task: o.RunTask = None,
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
    from penjing.cli.show import announce
    from penjing.cli.taskfile import call, load_task_file
    from penjing.core.errors import Exit
    from penjing.run.code import locate_task_file
    from penjing.run.folder import open_run
    from penjing.run.reading import read_settings
    from penjing.search.verify import verify as judge

    folder = open_run(run)
    asked = read_settings(folder)
    given = {
        "max_drop": max_drop,
        "latency": latency,
        "size": size,
        "memory": memory,
        "operations": operations,
    }
    chosen = any(value is not None for value in given.values())
    budget = o.make_budget(confidence, **given) if chosen else asked.budget
    file = load_task_file(
        task or locate_task_file(folder, asked.task_file, "verify"), None if task else announce
    )
    data = call(file.task, file).prepare(asked.seed)
    model = call(file.model, file) if "torch" in (asked.target.runtime, asked.target.mode) else None
    result = judge(run, data, budget, model=model)
    emit(result.model_dump(mode="json"), json, _show)
    return int(Exit.DONE if result.status == "reached" else Exit.BUDGET_NOT_REACHED)


def _show(data: dict[str, Any]) -> None:
    from penjing.core.verdict import Verdict

    typer.echo(str(Verdict.model_validate(data)))
