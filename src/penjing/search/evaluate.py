"""Evaluate plans: build in a process of its own, measure the file in its runtime, compare, judge."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.artefact import open_artefact
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Finished, Limits, candidate_seed
from penjing.core.files import refusing
from penjing.core.measurement import Measurement, Operations
from penjing.core.plan import Plan, plan_from_json, plan_name, plan_to_json
from penjing.core.progress import Line
from penjing.core.scratch import scratch
from penjing.core.target import Target
from penjing.core.trial import Trial, find_broken_limits
from penjing.measurement.agreement import TOLERANCE, difference
from penjing.measurement.measure import Measured, measure_all
from penjing.measurement.process import RuntimeProcess, factory_of, save_arrays
from penjing.measurement.quality import maximized
from penjing.measurement.sittings import Effort
from penjing.search.build_job import build
from penjing.search.expected import is_whole, read_expected
from penjing.search.finished import stop_on_fault, stopping_on_fault
from penjing.search.resources import limit_measurement
from penjing.search.session import Session, read_row
from penjing.search.values import BuildRow, Built, TrialRow

Outputs = NDArray[Any]

NOISES = 3.0
"""How many times the difference of two evaluations in memory a file's outputs may differ besides."""

REFERENCE = "float"
"""The float model in the target: what quality is paired with and latency is divided by."""


def artefact_folder(session: Session, key: str) -> Path:
    """Return the folder of a candidate's files."""
    return session.path("artefacts", key)


def evaluate(session: Session, plan: Plan, baseline: Trial, limits: Limits, words: str = "trying") -> Trial:
    """Try a plan once; what goes wrong becomes a failed trial with its reason.

    The two halves, building and measuring, are each kept when they are finished.
    """
    data = plan_to_json(plan)
    key = session.key("trial", data)
    known = session.ledger.get(key)
    if known is not None:
        return read_row(TrialRow, known, session.ledger.path).trial
    session.say(Line.phase(f"{words} {plan_name(plan)}"))
    building = partial(_build, session, data, key, limits)
    built = session.once("build", data, BuildRow, building)
    if built.finished.value is not None and not is_whole(artefact_folder(session, key), "artefact"):
        built = building()
    work = partial(_trial, session, plan, key, built.finished, baseline)
    return session.once("trial", data, TrialRow, work).trial


def _build(session: Session, data: list[dict[str, Any]], key: str, limits: Limits) -> BuildRow:
    folder = artefact_folder(session, key)
    shutil.rmtree(folder, ignore_errors=True)
    with refusing(folder):
        folder.mkdir(parents=True)
    seed = candidate_seed(session.seed, key)
    finished = session.executor.run(
        build, data, session.target, folder, seed, limits=limits, name=key, say=session.say
    )
    return BuildRow(finished=stop_on_fault(finished, plan_name(plan_from_json(data))))


def _trial(session: Session, plan: Plan, key: str, finished: Finished, baseline: Trial) -> TrialRow:
    name, data = plan_name(plan), plan_to_json(plan)
    failed = Trial(key=key, name=name, plan=data, status="failed", seconds={"compression": finished.seconds})
    if finished.value is None:
        words = f"{finished.status}: {finished.reason}"
        return TrialRow(trial=failed.model_copy(update={"reason": words}))
    start = time.perf_counter()
    folder = artefact_folder(session, key)
    built = Built.model_validate(finished.value)
    try:
        with stopping_on_fault(name):
            results = measure_candidates(
                session, {name: folder / "artefact"}, {name: built.operations}, "valid"
            )
            expected = read_expected(folder)
            exact = run_in_float32(session, session.target, folder / "artefact", len(expected))
        deviation = compare_with_memory(results[name], expected, built.noise, exact)
    except Refused as refused:
        if refused.code == Exit.ENVIRONMENT:
            raise
        return TrialRow(trial=failed.model_copy(update={"reason": f"not measured: {refused}"}))
    seconds = built.seconds | {"measurement": time.perf_counter() - start}
    seconds["start"] = finished.seconds - sum(built.seconds.values())
    trial = Trial(
        key=key,
        name=name,
        plan=data,
        status="done",
        folder=str(folder.relative_to(session.folder)),
        seconds=seconds,
        steps=built.steps,
    )
    judged = judge_trial(session, results[name], results[REFERENCE], deviation, trial, baseline)
    return TrialRow(trial=judged)


def measure_candidates(
    session: Session,
    folders: Mapping[str, Path],
    operations: Mapping[str, Operations | None],
    split: str,
    eager: bool = False,
) -> dict[str, Measured]:
    """Measure artefacts of this run beside the float reference, interleaved.

    Args:
        folders: artefacts by name, all for the run's target.
        operations: the counts that the build took, by name.
        split: `valid` or `test`.
        eager: also measure the original in PyTorch eager, under the name `eager`.
    """
    factory = factory_of(session.model)
    entries: dict[str, Any] = {REFERENCE: (session.path("float", "target"), session.reference, factory)}
    if eager:
        entries["eager"] = (session.path("float", "eager"), make_eager_target(session.target), factory)
    entries |= {name: (folder, session.target, factory) for name, folder in folders.items()}
    limits = limit_measurement(session.budget.time)
    return measure_all(
        entries, session.task, split, REFERENCE, operations, Effort(session.latency_seconds), limits
    )


def make_eager_target(target: Target) -> Target:
    """Return PyTorch eager with the same threads and batch."""
    return Target("torch", threads=target.threads, batch=target.batch)


@dataclass(frozen=True)
class Deviation:
    """How far a file's outputs are from the model's in memory, relative to the largest output.

    Attributes:
        found: as the target computes.
        exact: with everything float in float32: whether the file holds the model.
        limit: how far `exact` may be.
    """

    found: float
    exact: float
    limit: float


def compare_with_memory(
    mine: Measured, expected: Outputs, noise: float, exact: Outputs | None = None
) -> Deviation:
    """Compare a file's outputs with the model's in memory.

    Args:
        mine: the file's outputs.
        expected: the model's, for the first examples.
        noise: relative difference of two evaluations of the model in memory.
        exact: the file's outputs in float32, where the target computes in less.
    """
    found = difference(mine.outputs[: len(expected)], expected)
    held = found if exact is None else difference(exact, expected)
    return Deviation(found, held, TOLERANCE + NOISES * noise)


def run_in_float32(session: Session, target: Target, artefact: Path, examples: int) -> Outputs | None:
    """Return an artefact's outputs for the first examples in float32; None where the target computes so."""
    if target.mode != "bf16":
        return None
    inputs = tuple(x[:examples] for x in session.task.valid.arrays()[0])
    batch = open_artefact(artefact).evaluation_batch(session.task.batch_size)
    with (
        scratch() as folder,
        RuntimeProcess(artefact, target.reference) as process,
    ):
        return process.outputs(save_arrays(folder, inputs, "inputs"), batch, folder / "outputs.npy")


def judge_trial(
    session: Session,
    mine: Measured,
    reference: Measured,
    deviation: Deviation,
    trial: Trial,
    baseline: Trial,
) -> Trial:
    """Complete a trial with its measurement, its drop, its flips and the limits that it breaks.

    Args:
        session: of the run.
        mine, reference: the artefact and the float model, measured in one interleaved run.
        deviation: what `compare_with_memory` returned.
        trial: without its measurement.
        baseline: the float model, whose costs relative limits are shares of.
    """
    measurement = mine.measurement.model_copy(update={"difference": deviation.found})
    if deviation.exact > deviation.limit:
        words = f"{deviation.exact:.2g} (limit {deviation.limit:g})"
        reason = f"the file's outputs differ from the model's in memory by {words}"
        return trial.model_copy(update={"status": "failed", "reason": reason, "measurement": measurement})
    drop = compute_drop(session, measurement, reference.measurement)
    flips = compute_flips(mine.outputs, reference.outputs)
    base = reference.measurement if baseline.measurement is None else baseline.measurement
    warnings = _warnings(measurement) if trial.plan else ()
    return trial.model_copy(
        update={
            "measurement": measurement,
            "drop": drop,
            "flips": flips,
            "warnings": warnings,
            "breaks": find_broken_limits(session.budget, measurement, base, drop),
        }
    )


def compute_drop(session: Session, measurement: Measurement, reference: Measurement) -> float | None:
    """Return how much quality was lost, whatever the direction of the metric; None where undefined."""
    mine, base = getattr(measurement.quality, "value", None), getattr(reference.quality, "value", None)
    if mine is None or base is None:
        return None
    return float(base - mine) if maximized(session.task) else float(mine - base)


def compute_flips(outputs: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """Return the share of examples whose predicted class differs."""
    return float(np.mean(outputs.argmax(-1) != reference.argmax(-1)))


def _warnings(measurement: Measurement) -> tuple[str, ...]:
    ratio = getattr(measurement.latency, "ratio", None)
    if ratio is not None and ratio.low > 1:
        return (f"slower than the float model: {ratio.value:.2f} times its latency",)
    return ()
