"""`penjing resume`: go on with a run that was interrupted."""

from __future__ import annotations

from penjing.cli import options as o


def resume(run: o.RunPath, json: o.Json = False) -> int:
    """Go on with an interrupted run; nothing finished is repeated."""
    from penjing.cli.main import emit
    from penjing.cli.optimize import run_task_file
    from penjing.cli.show import exit_code, show_record
    from penjing.core.errors import Refused
    from penjing.run.folder import open_run
    from penjing.run.reading import settings_of
    from penjing.search.result import open_result

    folder = open_run(run)
    if (folder.path / "record.json").is_file():
        result = open_result(folder.path)
        emit(result.record, json, lambda _: show_record(result))
        return exit_code(result)
    path, budget, target, seed = settings_of(folder)
    if path is None:
        raise Refused(
            "the run was started from a task file",
            value="started from Python",
            place=str(folder.path),
            fix="call pj.optimize again with the same arguments and out=",
        )
    return run_task_file(path, budget, target, folder.path, seed, json=json)
