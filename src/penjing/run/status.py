"""What a run directory says of itself, read without disturbing the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penjing.core.trial import Trial
from penjing.run.folder import open_run
from penjing.run.ledger import Ledger
from penjing.run.lock import find_owner
from penjing.run.reading import find_best
from penjing.run.stopwatch import read_elapsed


def read_status(path: Path) -> dict[str, Any]:
    """Return path, state (`running`, `interrupted`, `finished`), trials, best artefact and what to do next.

    Raises:
        Refused: not a run directory, or its ledger is damaged.
    """
    run = open_run(path)
    with Ledger(run.ledger, create=False) as ledger:
        rows = ledger.all()
    trials = [Trial.model_validate(row["trial"]) for key, row in rows if key.startswith("trial-")]
    owner = find_owner(run.lock)
    finished = (run.path / "record.json").is_file()
    state = "finished" if finished else "running" if owner is not None else "interrupted"
    best = run.path / "best.json"
    follow = {
        "finished": f"penjing report {run.path}",
        "running": "",
        "interrupted": f"penjing resume {run.path}",
    }
    return {
        "path": str(run.path),
        "state": state,
        "driver": None if owner is None else owner.model_dump(mode="json"),
        "elapsed": max(
            [read_elapsed(run.elapsed) or 0.0, *(float(row.get("elapsed", 0.0)) for _, row in rows)]
        ),
        "trials": [
            {"name": t.name, "status": t.status, "feasible": t.feasible, "words": _words(t)} for t in trials
        ],
        "best": str(find_best(run.path).relative_to(run.path)) if best.is_file() else None,
        "next": follow[state],
    }


def _words(trial: Trial) -> str:
    if trial.status == "failed":
        return f"failed ({trial.reason})"
    drop = "" if trial.drop is None else f"{trial.drop * 100:+.2f} points lost, "
    speed = "latency not measured" if trial.latency_ms is None else f"{trial.latency_ms:.3g} ms"
    return f"{drop}{speed}"
