"""Judge a delivered artefact again, from its files, in fresh processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penjing.core.artefact import Artefact, deliver, open_artefact
from penjing.core.backend import backend_for, enter
from penjing.core.budget import Budget
from penjing.core.errors import Exit, Refused
from penjing.core.measurement import Operations
from penjing.core.scratch import scratch
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.core.verdict import Verdict
from penjing.measurement.certify import certify
from penjing.measurement.measure import measure_all
from penjing.measurement.process import factory_of
from penjing.run.reading import find_best, find_delivered, read_record
from penjing.search.certification import Used, judge_limits
from penjing.search.evaluate import REFERENCE


def verify(folder: Path | str, task: Task, budget: Budget, *, model: Model | None = None) -> Verdict:
    """Check an artefact's hashes and judge it against a budget on the test split of a task.

    Everything is measured anew: both files are loaded from disk, each in a process of its own.

    Args:
        folder: a run directory (its float model is the baseline), or the folder of an artefact.
        task: its test split is the evidence; give one that no search has seen.
        budget: the limits; `time` and `trials` are no matter of an artefact and are left out.
        model: the original; needed for a bare artefact, and for the runtime `torch`.

    Raises:
        Refused: a damaged file, no baseline to compare with, or bad data.
    """
    task = task.prepare()
    model = None if model is None else enter(model, task)[1]
    folder = Path(folder).expanduser().absolute()
    run = (folder / "best.json").is_file()
    artefact = open_artefact(_delivered_by(folder) if run else folder)
    with scratch() as temporary:
        baseline = folder / "float" / "target" if run else _delivered(model, task, artefact, temporary)
        return _judge(artefact, baseline, task, budget, model, _operations(folder) if run else {})


def _delivered_by(run: Path) -> Path:
    """Return the folder that a run delivered: what its record names, with the hash that it names."""
    best = find_best(run)
    return find_delivered(run, read_record(run)) if (run / "record.json").is_file() else best


def _delivered(model: Model | None, task: Task, artefact: Artefact, folder: Path) -> Path:
    if model is None:
        raise Refused(
            "needs the original beside a bare artefact",
            place="verify",
            fix="pass model=, or give the run directory instead of the artefact",
            code=Exit.USAGE,
        )
    return deliver(model, artefact.target.reference, folder / "float", example=task.valid.example()).path


def _operations(run: Path) -> dict[str, Operations | None]:
    """Return the counts that the run recorded, which the files alone do not give."""
    if not (run / "record.json").is_file():
        return {}
    record = read_record(run)
    return {REFERENCE: record.baselines.target.operations, "artefact": record.result.operations}


def _judge(
    artefact: Artefact,
    baseline: Path,
    task: Task,
    budget: Budget,
    model: Model | None,
    operations: dict[str, Any],
) -> Verdict:
    factory = None if model is None else factory_of(model)
    if not operations and model is not None:
        operations = {REFERENCE: backend_for(model).operations(model, task.valid.example())}
    entries = {
        REFERENCE: (baseline, open_artefact(baseline).target, factory),
        "artefact": (artefact.path, artefact.target, factory),
    }
    found = measure_all(entries, task, "test", REFERENCE, operations)
    certificate, _ = certify(
        found[REFERENCE].outputs,
        [("artefact", found["artefact"].outputs)],
        task.test.arrays()[1],
        task,
        budget.max_drop,
        budget.confidence,
        task.test.groups,
    )
    limits = budget.model_copy(update={"time": None, "trials": None})
    return judge_limits(
        limits, found["artefact"].measurement, found[REFERENCE].measurement, certificate, Used()
    )
