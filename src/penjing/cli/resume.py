"""`penjing resume`: go on with a run that was interrupted."""

from __future__ import annotations

from pathlib import Path

from penjing.cli import options as o


def resume(run: o.RunPath, json: o.Json = False) -> int:
    """Go on with an interrupted run; nothing finished is repeated."""
    from penjing.cli.main import emit
    from penjing.cli.optimize import run_task_file
    from penjing.cli.show import exit_code, show_record
    from penjing.core.budget import Budget
    from penjing.core.errors import Refused
    from penjing.core.target import Target
    from penjing.run.folder import open_run, read_config
    from penjing.run.record import open_result

    folder = open_run(run)
    if (folder.path / "record.json").is_file():
        result = open_result(folder.path)
        emit(result.record, json, lambda record: show_record(record, result.report))
        return exit_code(result.record)
    config = read_config(folder)
    if not config.get("task_file"):
        raise Refused(
            "the run was started from a task file",
            value="started from Python",
            place=str(folder.path),
            fix="call pj.optimize again with the same arguments and out=",
        )
    budget, target = Budget(**config["budget"]), Target(**config["target"])
    path = Path(config["task_file"])
    return run_task_file(path, budget, target, folder.path, config["seed"], json=json)
