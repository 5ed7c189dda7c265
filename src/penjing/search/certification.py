"""From the trials of a search to the candidates of a certificate, and from measurements to a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from penjing.core.budget import COSTS, Budget
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured, Operations, Quantity
from penjing.core.method import Stage, stage_of
from penjing.core.plan import plan_from_json, plan_name
from penjing.core.progress import Line
from penjing.core.registry import method_from_json
from penjing.core.trial import Trial, get_cost
from penjing.core.verdict import Certificate, LimitVerdict, Verdict, judge_upper
from penjing.measurement.certify import certify
from penjing.planners.bisection import Setting
from penjing.report.record import StepRow
from penjing.search.build_job import STRUCTURE
from penjing.search.evaluate import REFERENCE, measure_candidates
from penjing.search.session import Session
from penjing.search.values import Tested

CANDIDATES = 4
"""Candidates tested beside the float model; more would only add chances to stop early."""


def order_candidates(
    trials: Sequence[Trial], baseline: Trial, passes: Callable[[Trial], bool]
) -> list[Trial]:
    """Return the candidates in the fixed order of testing: safest first, fastest last.

    Only trials that will probably pass, of these those that keep every limit on cost where there are any,
    and of these the Pareto front of latency and drop on the data of the search. The float model in the
    target comes first: it is the safest of all; where it keeps every limit, no slower model is tested.
    """
    fit = [t for t in trials if passes(t) and t.latency_ms is not None and t.drop is not None]
    fit = [t for t in fit if t.feasible] or fit
    if baseline.feasible and baseline.latency_ms is not None:
        fit = [t for t in fit if (t.latency_ms or 0.0) < baseline.latency_ms]
    front = [t for t in fit if not any(_dominates(other, t) for other in fit)]
    front.sort(key=lambda t: (-(t.latency_ms or 0.0), t.drop or 0.0))
    return [baseline, *front[-CANDIDATES:]]


def _dominates(a: Trial, b: Trial) -> bool:
    pair_a, pair_b = (a.latency_ms or 0.0, a.drop or 0.0), (b.latency_ms or 0.0, b.drop or 0.0)
    return pair_a != pair_b and pair_a[0] <= pair_b[0] and pair_a[1] <= pair_b[1]


def choose_candidate(candidates: Sequence[Trial], certified: int | None, budget: Budget) -> int:
    """Return the index of the candidate to deliver: the fastest certified one.

    Where nothing is certified (too few examples, or no limit on quality to certify): with a limit the
    safest candidate, which is the float model; without one, the candidate that breaks the limits on cost
    least and, among these, loses least quality.
    """
    if budget.max_drop is not None:
        return 0 if certified is None else certified
    return min(
        range(len(candidates)),
        key=lambda i: (max([1.0, *candidates[i].breaks.values()]), candidates[i].drop or 0.0),
    )


@dataclass(frozen=True)
class Used:
    """What a run has used: seconds, trials, and whether all of its time is known."""

    seconds: float = 0.0
    trials: int = 0
    all_time_known: bool = True


def judge_limits(
    budget: Budget,
    result: Measurement,
    baseline: Measurement,
    certificate: Certificate | None,
    used: Used,
) -> Verdict:
    """Judge every limit of a budget on what was measured on the unseen split.

    Args:
        budget: the limits.
        result, baseline: measured in one interleaved run on the target.
        certificate: of the quality; None where the budget has no limit on it.
        used: by the whole run.
    """
    limits: dict[str, LimitVerdict] = {}
    if budget.max_drop is not None and certificate is not None:
        limits["max_drop"] = certificate.judge(budget.max_drop, baseline.quality)
    for name in budget.costs:
        limits[name] = _judge_cost(budget, name, result, baseline)
    if budget.time is not None:
        limits["time"] = _judge_time(budget.time, used)
    if budget.trials is not None:
        limits["trials"] = _exact(float(budget.trials), float(used.trials), None, "trials")
    return Verdict.of(limits, certificate)


def _judge_time(limit: float, used: Used) -> LimitVerdict:
    exact = _exact(limit, used.seconds, None, "s")
    if used.all_time_known or exact.status == "not_reached":
        return exact
    reason = "the run was ended at least once, and how long it had taken by then is not known"
    return exact.model_copy(update={"status": "inconclusive", "reason": reason, "high": None})


def _judge_cost(budget: Budget, name: str, result: Measurement, baseline: Measurement) -> LimitVerdict:
    limit, unit = budget.costs[name], COSTS[name]
    if name == "latency":
        return _judge_latency(budget, result, baseline)
    value, base = get_cost(result, name), get_cost(baseline, name)
    if value is None or (limit.relative and not base):
        reason = (
            getattr(result.memory_bytes, "reason", "") if name == "memory" else f"{name} was not measured"
        )
        return LimitVerdict(
            status="inconclusive",
            limit=limit.value,
            measured=value,
            low=None,
            high=None,
            baseline=base,
            unit=unit,
            reason=reason or f"the baseline's {name} was not measured",
        )
    if name == "memory":
        assert isinstance(result.memory_bytes, Estimate)
        return judge_upper(limit.absolute(base or 0.0), result.memory_bytes, base, unit)
    return _exact(limit.absolute(base or 0.0), value, base, unit)


def _judge_latency(budget: Budget, result: Measurement, baseline: Measurement) -> LimitVerdict:
    limit = budget.costs["latency"]
    base, mine = baseline.latency, result.latency
    if isinstance(mine, NotMeasured) or isinstance(base, NotMeasured):
        reason = mine.reason if isinstance(mine, NotMeasured) else "the baseline's latency was not measured"
        return LimitVerdict(
            status="inconclusive",
            limit=limit.value,
            measured=None,
            low=None,
            high=None,
            baseline=None,
            unit="ms",
            reason=reason,
        )
    if not limit.relative:
        return judge_upper(limit.value, mine.p50_ms, base.p50_ms.value, "ms")
    base_ms = base.p50_ms.value
    ratio = mine.ratio if mine.ratio is not None else _own_ratio(mine)
    scaled = ratio.model_copy(
        update={"value": ratio.value * base_ms, "low": ratio.low * base_ms, "high": ratio.high * base_ms}
    )
    return judge_upper(limit.value * base_ms, scaled, base_ms, "ms")


def _own_ratio(latency: Latency) -> Estimate:
    """Return the ratio of the reference to itself: exactly 1."""
    return latency.p50_ms.model_copy(update={"value": 1.0, "low": 1.0, "high": 1.0, "unit": "ratio"})


def _exact(limit: float, value: float, base: float | None, unit: str) -> LimitVerdict:
    return LimitVerdict(
        status="reached" if value <= limit else "not_reached",
        limit=limit,
        measured=value,
        low=value,
        high=value,
        baseline=base,
        unit=unit,
    )


@dataclass(frozen=True)
class Judged:
    """The end of a run: what is delivered, what it is worth, and beside what.

    Attributes:
        chosen: the trial whose artefact is delivered.
        certified: whether its quality passed the test (always false without a limit on quality).
        result, baseline, eager: measured on the test split in one interleaved run.
        runners_up: the other candidates, measured likewise.
        ablation: what each step of the plan bought.
        seconds: spent here, by activity.
    """

    chosen: Trial
    certified: bool
    verdict: Verdict
    result: Measurement
    baseline: Measurement
    eager: Measurement | None
    runners_up: tuple[Measurement, ...]
    ablation: list[StepRow]
    seconds: dict[str, float]
    notes: tuple[str, ...]


def certify_and_judge(session: Session, trials: Sequence[Trial], baseline: Trial, setting: Setting) -> Judged:
    """Measure the candidates on the test split, test them in fixed order, choose one and judge it.

    The float model in another runtime or precision than the baseline's is a candidate like any other.
    """
    start = setting.start
    if start is not None and _slower(start, baseline):
        start = None
    tried = [*trials, *([start] if start is not None else [])]
    candidates = _candidates(session.budget, tried, baseline, setting)
    keys = [candidate.key for candidate in candidates]
    work = partial(_measure_and_test, session, candidates, setting.start)
    done = session.once("certificate", keys, Tested, work)
    measured = done.measurements
    index = choose_candidate(candidates, done.certified, session.budget)
    chosen = candidates[index]
    difference = chosen.measurement.difference if chosen.measurement is not None else None
    result, reference = measured[keys[index]].model_copy(update={"difference": difference}), measured[keys[0]]
    used = Used(session.elapsed, len(trials), session.all_time_known)
    return Judged(
        chosen=chosen,
        certified=done.certified is not None,
        verdict=judge_limits(session.budget, result, reference, done.certificate, used),
        result=result,
        baseline=reference,
        eager=measured.get("eager"),
        runners_up=tuple(measured[key] for i, key in enumerate(keys) if i not in (0, index)),
        ablation=_ablation(session, chosen, baseline, measured),
        seconds=done.seconds,
        notes=chosen.warnings,
    )


def _slower(a: Trial, b: Trial) -> bool:
    """Tell whether one trial is slower than another; one that was not timed counts as slower."""
    return a.latency_ms is None or (b.latency_ms is not None and a.latency_ms > b.latency_ms)


def _candidates(budget: Budget, trials: Sequence[Trial], baseline: Trial, setting: Setting) -> list[Trial]:
    if budget.max_drop is not None:
        return order_candidates(trials, baseline, setting.passes)
    done = [trial for trial in trials if trial.status == "done" and trial.drop is not None]
    done.sort(key=lambda t: (max([1.0, *t.breaks.values()]), t.drop or 0.0))
    return [baseline, *done[:CANDIDATES]]


def _measure_and_test(session: Session, candidates: Sequence[Trial], start: Trial | None) -> Tested:
    count = "1 candidate" if len(candidates) == 1 else f"{len(candidates)} candidates"
    session.say(Line.phase(f"certifying {count} on {len(session.task.test)} unseen examples"))
    began = time.perf_counter()
    others = candidates[1:]
    folders = {c.key: session.path(str(c.folder), "artefact") for c in others}
    if start is not None:
        folders[start.key] = session.path(str(start.folder), "artefact")
    counts: dict[str, Operations | None] = {c.key: c.measurement.operations for c in others if c.measurement}
    assert candidates[0].measurement is not None
    counts |= {REFERENCE: candidates[0].measurement.operations, "eager": candidates[0].measurement.operations}
    for candidate in others:
        before = session.path(str(candidate.folder), STRUCTURE)
        if before.is_dir():
            folders[f"{STRUCTURE} {candidate.key}"] = before
    eager = session.path("float", "eager").is_dir()
    results = measure_candidates(session, folders, counts, "test", eager=eager)
    named = {candidates[0].key: results.pop(REFERENCE)} | results
    names = {c.key: c.name for c in candidates} | {"eager": "float"}
    targets = session.task.test.arrays()[1]
    tested = candidates
    if session.budget.max_drop is None:
        tested = [candidates[choose_candidate(candidates, None, session.budget)]]
    certificate, certified = certify(
        named[candidates[0].key].outputs,
        [(c.name, named[c.key].outputs) for c in tested],
        targets,
        session.task,
        session.budget.max_drop,
        session.budget.confidence,
        session.task.test.groups,
    )
    return Tested(
        certificate=certificate,
        certified=certified,
        measurements={
            key: m.measurement.model_copy(update={"name": names.get(key, key)}) for key, m in named.items()
        },
        seconds={"measurement": time.perf_counter() - began},
    )


def _ablation(
    session: Session, chosen: Trial, baseline: Trial, measured: dict[str, Measurement]
) -> list[StepRow]:
    """Return a row for the float model and one for each step: quality, latency, size, operations.

    Where the result runs in another runtime or precision than the baseline, that is the first step.
    Quality is that of the model in memory on the first examples of the data of the search. Latency and size
    are those of the file: a step that only changes weights keeps the file's shape and so its latency.
    """
    current = measured[baseline.key]
    moved = measured.get(session.key("runtime", session.target.label))
    where = "the target" if moved is None else session.reference.label
    rows = [_row(f"float model in {where}", current.quality, current)]
    if moved is not None and chosen.key != baseline.key:
        current = moved
        words = f"the same in {session.target.label}"
        rows.append(_row(words, current.quality, current))
    shaped = measured.get(f"{STRUCTURE} {chosen.key}")
    for step in chosen.steps:
        kind = stage_of(method_from_json(step.step))
        if kind is Stage.STRUCTURE:
            current = shaped or measured[chosen.key]
        elif kind is Stage.PRECISION:
            current = measured[chosen.key]
        words = plan_name(plan_from_json([step.step]))
        counted = current.model_copy(update={"operations": step.operations})
        rows.append(_row(words, step.quality, counted))
    return rows


def _row(step: str, quality: Quantity, measurement: Measurement) -> StepRow:
    p50 = measurement.latency.p50_ms if isinstance(measurement.latency, Latency) else None
    return StepRow(
        step=step,
        quality=quality,
        latency_ms=None if p50 is None else p50.value,
        low=None if p50 is None else p50.low,
        high=None if p50 is None else p50.high,
        size_bytes=measurement.size_bytes,
        operations=measurement.operations,
    )
