"""What a run directory says of itself, read without disturbing the run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from penjing.core.errors import Refused
from penjing.run.folder import RunFolder, open_run
from penjing.run.ledger import LedgerReader
from penjing.run.lock import find_owner
from penjing.run.reading import find_best
from penjing.run.stopwatch import read_elapsed

Plain = dict[str, Any]


class _Value(BaseModel):
    value: float | None = None


class _Latency(BaseModel):
    p50_ms: _Value = _Value()


class _Measured(BaseModel):
    latency: _Latency = _Latency()


class _Tried(BaseModel):
    """A trial as far as people want to see it."""

    name: str
    status: Literal["done", "failed"]
    reason: str = ""
    drop: float | None = None
    breaks: dict[str, float] = {}
    measurement: _Measured | None = None


def read_status(path: Path | str) -> Plain:
    """Return path, state (`running`, `interrupted`, `finished`), trials, best artefact and what to do next.

    Nothing is written, and one trial is in memory at a time but for what is shown of it.

    Raises:
        Refused: not a run directory, or its ledger is damaged.
    """
    run = open_run(path)
    trials, elapsed = _read_trials(run)
    owner = find_owner(run.lock)
    state = "finished" if run.finished else "running" if owner is not None else "interrupted"
    place = shlex.quote(str(run.path))
    following = {"finished": f"penjing report {place}", "interrupted": f"penjing resume {place}"}
    return {
        "path": str(run.path),
        "state": state,
        "driver": None if owner is None else owner.model_dump(mode="json"),
        "elapsed": max(elapsed, read_elapsed(run.elapsed) or 0.0),
        "trials": trials,
        "best": str(find_best(run.path).relative_to(run.path)) if run.best.is_file() else None,
        "next": following.get(state, ""),
    }


def _read_trials(run: RunFolder) -> tuple[list[Plain], float]:
    """Return what is shown of each trial, and the seconds that the run took."""
    trials, elapsed = [], 0.0
    with ExitStack() as stack:
        rows: Iterator[tuple[str, Plain]] = iter(())
        if run.ledger.exists() or run.finished:  # a run that was just begun has none yet
            rows = stack.enter_context(LedgerReader(run.ledger)).summaries()
        for key, row in rows:
            spent = row.get("elapsed")
            elapsed = max(elapsed, float(spent)) if isinstance(spent, int | float) else elapsed
            if key.startswith("trial-"):
                trials.append(_shown(row.get("trial"), run))
    return trials, elapsed


def _shown(content: object, run: RunFolder) -> Plain:
    try:
        trial = _Tried.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(
            "must hold trials as this version writes them",
            value=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            place=str(run.ledger),
            fix="read it with the version of Penjing that made it, which env.json names",
        ) from error
    feasible = trial.status == "done" and not trial.breaks
    return {"name": trial.name, "status": trial.status, "feasible": feasible, "words": _words(trial)}


def _words(trial: _Tried) -> str:
    if trial.status == "failed":
        return f"failed ({trial.reason})"
    drop = "" if trial.drop is None else f"{trial.drop * 100:+.2f} points lost, "
    median = None if trial.measurement is None else trial.measurement.latency.p50_ms.value
    return f"{drop}{'latency not measured' if median is None else f'{median:.3g} ms'}"
