"""Open a run: check everything that can be checked, make or reopen the folder, take the lock."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from penjing.core.backend import enter
from penjing.core.budget import Budget
from penjing.core.config import refusal
from penjing.core.errors import Exit, Refused
from penjing.core.files import remove_leftovers
from penjing.core.progress import Line, Say, silent
from penjing.core.scratch import scratch_in
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.measurement.quality import maximized
from penjing.planners.bisection import Bisection
from penjing.processes.local import LocalExecutor
from penjing.run.folder import RunFolder, create_run, open_run, read_config
from penjing.run.ledger import Ledger
from penjing.run.lock import DriverLock
from penjing.run.stopwatch import Stopwatch, read_elapsed
from penjing.search.identity import Question, identify, keep_identity
from penjing.search.resources import check_memory, estimate_disk_bytes, estimate_model_bytes
from penjing.search.runtimes import check_target
from penjing.search.session import Session

CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "134217728",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment of the processes that build candidates, where the user has not set it.

The MALLOC variables keep glibc from returning large buffers to the system after every operation. Waiting
threads that sleep instead of spinning cost little on an idle machine and save most of the time on a busy one.
"""


def check_budget(budget: Budget) -> None:
    """Refuse a budget without any limit on the result."""
    if budget.max_drop is None and not budget.costs:
        raise Refused(
            "must have a limit on quality or cost",
            value=str(budget),
            place="budget",
            fix="give max_drop, latency, size, memory or operations",
            code=Exit.USAGE,
        )


@contextmanager
def open_session(
    model: Model,
    task: Task,
    budget: Budget,
    target: Target,
    out: Path | str | None,
    seed: int,
    options: dict[str, Any],
) -> Iterator[Session]:
    """Yield the session of a new run, or of the unfinished one in `out`.

    Raises:
        Refused: bad arguments, too little memory or disk, a run of something else in `out`, or one that
            another process drives.
        KeyboardInterrupt: with a message that says how to go on.
    """
    say, name, config, planner = _options(options)
    check_budget(budget)
    check_target(target)
    maximized(task)
    asked = task.prepare(seed)
    backend, model, task = enter(model, asked)
    backend.check(model, task.valid.example())
    weights = estimate_model_bytes(backend, model)
    check_memory(weights)
    identity = identify(Question(model, asked, budget, target, seed, planner), backend)
    with ExitStack() as stack:
        run = _unfinished(out) or create_run(
            out, name or "run", needed_bytes=estimate_disk_bytes(weights, budget)
        )
        say(Line.note(f"run directory: {run.path}"))
        stack.enter_context(DriverLock(run.lock))
        remove_leftovers(run.path)
        stack.enter_context(scratch_in(run.path))
        begun = run.path.joinpath("float").exists()  # the survey's first trace: before it there is no work
        keep_identity(run, config, identity)
        try:
            ledger = stack.enter_context(Ledger(run.ledger, create=not begun))
            noted = read_elapsed(run.elapsed)
            stopwatch = stack.enter_context(Stopwatch(run.elapsed, _elapsed(ledger, noted)))
            executor = stack.enter_context(_executor(model, task, run, say))
            yield Session(
                folder=run.path,
                ledger=ledger,
                executor=executor,
                model=model,
                task=task,
                budget=budget,
                target=target,
                reference=target.reference,
                seed=seed,
                options=planner,
                identity=identity.sha256,
                notes=identity.notes,
                stopwatch=stopwatch,
                all_time_known=noted is not None or not begun,
                say=say,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_resume(run)) from None


def _elapsed(ledger: Ledger, noted: float | None) -> float:
    return max([noted or 0.0, *(float(row.get("elapsed", 0.0)) for _, row in ledger.summaries())])


def _options(options: dict[str, Any]) -> tuple[Say, str, dict[str, Any], Bisection]:
    rest = dict(options)
    say, name, config = rest.pop("say", None), rest.pop("name", ""), rest.pop("config", {})
    try:
        planner = Bisection(**rest)
    except ValueError as error:
        raise refusal(
            error, "optimize", {**Bisection.model_fields, "say": None, "name": None, "config": None}
        ) from None
    return _isolated(say) if say else silent, name, config, planner


def _isolated(say: Say) -> Say:
    """Return a listener that is not asked again once it has failed: it must not end the run."""
    failed = False

    def guarded(line: Line) -> None:
        nonlocal failed
        if failed:
            return
        try:
            say(line)
        except Exception as error:  # noqa: BLE001  the user's function may raise anything
            failed = True
            warnings.warn(f"say raised {type(error).__name__}: {error}; it is not called again", stacklevel=2)

    return guarded


def _how_to_resume(run: RunFolder) -> str:
    task_file = read_config(run).get("task_file")
    if task_file:
        command = f"penjing resume {shlex.quote(str(run.path))} --task {shlex.quote(task_file)}"
        return f"interrupted; what was finished is kept. Go on with: {command}"
    return f"interrupted; what was finished is kept. Go on with the same call and out={str(run.path)!r}"


def _executor(model: Model, task: Task, run: RunFolder, say: Say) -> LocalExecutor:
    environment = {name: os.environ.get(name, value) for name, value in CHILD_ENVIRONMENT.items()}
    try:
        return LocalExecutor((model, task), logs=run.logs, environment=environment)
    except Refused as refused:
        if refused.code == Exit.ENVIRONMENT:
            raise
        text = f"warning: {refused} Candidates run in this process: no limits of time and memory hold"
        say(Line.warning(text))
        return LocalExecutor((model, task), logs=run.logs, in_process=True)


def _unfinished(out: Path | str | None) -> RunFolder | None:
    if out is None:
        return None
    run = RunFolder(Path(out).expanduser().absolute())
    return open_run(run.path) if run.config.is_file() and not run.finished else None
