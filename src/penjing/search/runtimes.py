"""Which runtime and float precision is fastest for a model on this machine, before any compression."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from penjing.core.errors import Exit, Refused
from penjing.core.executor import candidate_seed
from penjing.core.extras import missing
from penjing.core.measurement import Latency, Measurement, Operations
from penjing.core.progress import Line
from penjing.core.system import system_fault
from penjing.core.target import Target, need_to_deliver, runtime_for
from penjing.core.trial import Trial
from penjing.measurement.measure import Measured, measure_all
from penjing.measurement.process import factory_of
from penjing.measurement.sittings import Effort
from penjing.planners.bisection import Setting
from penjing.report.record import RuntimeRow
from penjing.search.evaluate import REFERENCE, compare_with_memory, judge_trial, run_in_float32
from penjing.search.expected import read_expected
from penjing.search.finished import stop_on_fault
from penjing.search.resources import limit_candidate, limit_measurement
from penjing.search.runtimes_job import deliver_float
from penjing.search.session import Session
from penjing.search.values import RuntimeChoice, Survey


@dataclass(frozen=True)
class ChosenRuntime:
    """Where the trials of a run are made.

    Attributes:
        session: with the chosen target.
        start: the float model there as a trial; None where the baseline runs there.
        found: by the comparison.
    """

    session: Session
    start: Trial | None
    found: RuntimeChoice


def check_target(target: Target) -> None:
    """Refuse a target that cannot be delivered to, or whose precision this processor lacks.

    Raises:
        Refused: an extra is missing, or there is no bfloat16 where it is asked for.
    """
    for each in dict.fromkeys((target.reference, *(() if target.runtime == "auto" else (target,)))):
        need_to_deliver(each)
        runtime_for(each)
    if target.mode == "bf16" and "bf16" not in list_openvino_modes():
        raise Refused(
            "needs a processor that computes in bf16",
            value="one that offers f32 only",
            place="target.mode",
            fix="use the mode f32",
            code=Exit.ENVIRONMENT,
        )


def list_openvino_modes() -> tuple[str, ...]:
    """Return the float precisions that OpenVINO has here, none where it is not installed."""
    if missing("openvino") or missing("onnx"):
        return ()
    from penjing.targets.openvino import list_float_precisions

    return list_float_precisions()


def list_competitors(target: Target, backend: str) -> tuple[Target, ...]:
    """Return the targets to compare with the baseline's: for `auto` every one that is installed.

    PyTorch competes only where it is asked to and the model is a torch module; for a target whose precision
    is lower than the baseline's, the target itself is the only one.
    """
    if target.runtime != "auto":
        return (target,) if target.reference != target else ()
    named: list[tuple[str, str]] = [("openvino", mode) for mode in list_openvino_modes()]
    if target.mode == "torch" and backend == "torch" and not missing("torch"):
        named += [("torch", "eager"), ("torch", "compiled")]
    common = target.model_dump(exclude={"runtime", "mode"})
    return tuple(Target(**{"runtime": runtime, "mode": mode, **common}) for runtime, mode in named)


def choose_runtime(session: Session, survey: Survey, setting: Setting) -> ChosenRuntime:
    """Measure the float model in every competing runtime and precision, and choose; kept in the ledger.

    Chosen is the fastest of those that are faster than the baseline with certainty, whose file agrees with
    the model and whose quality will probably be certified. A target whose precision was named is kept.
    """
    asked = session.target
    targets = {target.label: target for target in list_competitors(asked, survey.backend)}
    work = partial(_compare, session, survey, setting, targets)
    found = session.once("runtimes", sorted(targets), RuntimeChoice, work) if targets else _alone(session)
    chosen = targets.get(found.chosen, session.reference)
    for line in found.words:
        session.say(Line.note(line))
    return ChosenRuntime(replace(session, target=chosen), found.trials.get(chosen.label), found)


def _alone(session: Session) -> RuntimeChoice:
    label = session.reference.label
    notes = (f"no other runtime than {label} is installed",) if session.target.runtime == "auto" else ()
    return RuntimeChoice(chosen=label, words=notes, notes=notes)


def _compare(session: Session, survey: Survey, setting: Setting, targets: dict[str, Target]) -> RuntimeChoice:
    session.say(Line.phase(f"comparing runtimes: {', '.join([session.reference.label, *targets])}"))
    delivered, seconds = _deliver(session, targets)
    start = time.perf_counter()
    usable = {label: target for label, target in targets.items() if label not in delivered}
    trials, reasons = _measure(session, usable, survey.operations, survey.noise, setting.baseline)
    seconds = seconds | {"measurement": time.perf_counter() - start}
    reasons = delivered | reasons
    for label, trial in trials.items():
        if trial.status == "failed":
            reasons[label] = trial.reason
        elif not setting.passes(trial):
            reasons[label] = "its quality would not be certified"
    best = _fastest(session, trials, reasons)
    notes = tuple(f"{label} was not chosen: {reason}" for label, reason in reasons.items())
    return RuntimeChoice(
        chosen=best,
        words=(*_words(session, trials, best), *notes),
        rows={label: _row(trial) for label, trial in trials.items()},
        notes=notes,
        trials=trials,
        seconds=seconds,
    )


def _deliver(session: Session, targets: dict[str, Target]) -> tuple[dict[str, str], dict[str, float]]:
    folders = {_folder(label): target for label, target in targets.items()}
    for name in folders:
        shutil.rmtree(session.path("float", name), ignore_errors=True)
    finished = session.executor.run(
        deliver_float,
        folders,
        session.path("float"),
        candidate_seed(session.seed, "runtimes"),
        limits=limit_candidate(session.budget.time),
        name="runtimes",
        say=session.say,
    )
    found = stop_on_fault(finished, "runtimes").value
    if found is None:
        reason = f"{finished.status}: {finished.reason}"
        return dict.fromkeys(targets, reason), {"export": finished.seconds}
    return dict(found["refused"]), dict(found["seconds"])


def _measure(
    session: Session, targets: dict[str, Target], operations: Operations, noise: float, baseline: Trial
) -> tuple[dict[str, Trial], dict[str, str]]:
    """Return a trial for each target that can be measured, and why the others cannot."""
    factory = factory_of(session.model)
    entries: dict[str, Any] = {REFERENCE: (session.path("float", "target"), session.reference, factory)}
    reasons: dict[str, str] = {}
    artefacts = {label: session.path("float", _folder(label), "artefact") for label in targets}
    for label, target in targets.items():
        entries[label] = (artefacts[label], target, factory)
    counts = dict.fromkeys(entries, operations)
    found = _measured(session, entries, counts, reasons)
    trials = {}
    expected = read_expected(session.path("float"))
    for label in found.keys() - {REFERENCE}:
        exact = run_in_float32(session, targets[label], artefacts[label], len(expected))
        deviation = compare_with_memory(found[label], expected, noise, exact)
        blank = Trial(
            key=session.key("runtime", label),
            name=f"float, {label}",
            plan=[],
            status="done",
            folder=f"float/{_folder(label)}",
        )
        trials[label] = judge_trial(session, found[label], found[REFERENCE], deviation, blank, baseline)
    return {label: trials[label] for label in targets if label in trials}, reasons


def _measured(
    session: Session, entries: dict[str, Any], counts: dict[str, Any], reasons: dict[str, str]
) -> dict[str, Measured]:
    """Measure side by side; what cannot be loaded or run is left out with its reason, and tried no more."""
    limits = limit_measurement(session.budget.time)
    try:
        return measure_all(
            entries, session.task, "valid", REFERENCE, counts, Effort(session.latency_seconds), limits
        )
    except Refused as error:
        if system_fault(error):
            raise
        alone = {}
        for label, entry in entries.items():
            pair = {REFERENCE: entries[REFERENCE], label: entry}
            try:
                measure_all(pair, session.task, "valid", REFERENCE, counts, Effort(0.0), limits)
                alone[label] = entry
            except Refused as refusal:
                if label == REFERENCE:
                    raise
                reasons[label] = str(refusal)
        return measure_all(
            alone, session.task, "valid", REFERENCE, counts, Effort(session.latency_seconds), limits
        )


def _fastest(session: Session, trials: Mapping[str, Trial], reasons: Mapping[str, str]) -> str:
    if session.target.runtime != "auto":
        return session.target.label if session.target.label in trials else session.reference.label
    sure = {
        label: ratio.value
        for label, trial in trials.items()
        if label not in reasons and (ratio := _ratio(trial.measurement)) is not None and ratio.high < 1
    }
    return min(sure, key=lambda label: sure[label], default=session.reference.label)


def _words(session: Session, trials: Mapping[str, Trial], best: str) -> list[str]:
    """Return a line for each competitor, and what the chosen one gains alone."""
    lines = []
    for label, trial in trials.items():
        ratio = _ratio(trial.measurement)
        if ratio is None or trial.latency_ms is None:
            lines.append(f"{label}: latency not measured")
            continue
        drop = "" if trial.drop is None else f", {trial.drop * 100:+.2f} points lost"
        lines.append(
            f"{label}: {trial.latency_ms:.3g} ms, {_times(ratio.value)} {session.reference.label}{drop}"
        )
    chosen = trials.get(best)
    ratio = None if chosen is None else _ratio(chosen.measurement)
    if ratio is None:
        return [*lines, f"the trials run in {best}"]
    return [*lines, f"{best} alone is {_times(ratio.value)} {session.reference.label}"]


def _times(ratio: float) -> str:
    return f"{1 / ratio:.2f} times faster than" if ratio <= 1 else f"{ratio:.2f} times slower than"


def _ratio(measurement: Measurement | None) -> Any:
    latency = None if measurement is None else measurement.latency
    return latency.ratio if isinstance(latency, Latency) else None


def _row(trial: Trial) -> RuntimeRow:
    return RuntimeRow(
        measurement=trial.measurement,
        drop=trial.drop,
        flips=trial.flips,
        status=trial.status,
        reason=trial.reason,
    )


def _folder(label: str) -> str:
    return label.replace(" ", "-")
