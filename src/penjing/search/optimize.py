"""The main job: a model, its data and a budget in; the fastest artefact that keeps to it out."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from penjing.arrays.statistics import needed_examples, smallest_certifiable_drop
from penjing.core.budget import Budget
from penjing.core.errors import Refused
from penjing.core.executor import Finished, candidate_seed, refused_from
from penjing.core.measurement import Measurement, Operations
from penjing.core.plan import Plan, plan_from_json, plan_name
from penjing.core.progress import Line
from penjing.core.search import search
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.trial import Trial
from penjing.core.value import Model
from penjing.measurement.measure import Measured
from penjing.measurement.nondeterminism import within_noise
from penjing.measurement.quality import reacts
from penjing.planners.bisection import ROUNDINGS, Bisection, Setting, bisection
from penjing.planners.floor import floor_plan
from penjing.planners.forecast import Forecast, Timing, forecast
from penjing.planners.recovery import epochs_of, repairs
from penjing.search.certification import certify_and_judge
from penjing.search.evaluate import REFERENCE, apart_from_memory, evaluate, judge, measure_candidates
from penjing.search.jobs import survey
from penjing.search.open import open_session
from penjing.search.recipes import choose_recipes
from penjing.search.record import Result, finish, write_best
from penjing.search.resources import candidate_limits
from penjing.search.runtimes import choose_runtime
from penjing.search.session import Session

PATIENCE, LEAST_PATIENCE = 20.0, 300.0
"""A candidate may take so many times the forecast of a trial, and at least so many seconds."""

FLOOR_SHARE = 0.1
"""The probe of what can be reached may take this share of the time."""


PROBED_TRIALS = 6
"""Trials from which on some may go into comparing roundings."""


def optimize(
    model: Model,
    task: Task,
    budget: Budget,
    *,
    target: Target | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Find the fastest artefact that keeps to a budget, and certify it on data the search never saw.

    An unfinished run in `out` with the same model, data, budget, target and seed is resumed.

    Args:
        model: a trained model; never changed.
        task: data, loss and metric.
        budget: at least one limit.
        target: where the result must run; ONNX Runtime on one CPU thread, one example at a time by default.
        out: the run directory; `runs/<name>-N` by default.
        seed: every random choice derives from it.
        options: fields of `penjing.planners.bisection.Bisection`, `say` (receives progress lines) and
            `config` (kept in the run directory).

    Returns:
        the result: verdict, record, artefact, report.

    Raises:
        Refused: bad model, data or configuration, before anything slow starts.
        KeyboardInterrupt: everything finished is kept; the same call resumes.
    """
    with open_session(model, task, budget, target or Target(), out, seed, options) as session:
        return _run(session)


def _run(session: Session) -> Result:
    facts = session.once("survey", None, partial(_survey, session))
    session.task.check_labels(facts["outputs"])
    baselines = session.once("baseline", None, partial(_baseline, session, facts))
    baseline = Trial.model_validate(baselines["trial"])
    write_best(session, [baseline])
    kinds = {layer["kind"] for layer in facts["layers"]}
    setting = Setting(
        budget=session.budget,
        baseline=baseline,
        precisions=(),
        prunable=any(group["size"] > 1 for group in facts["groups"]),
        repair=repairs(kinds, facts["backend"]),
        trainable=facts["epoch_seconds"] is not None,
        training_precision=facts["precision"] or "float32",
        n_test=len(session.task.test),
        widths=tuple(group["size"] for group in facts["groups"]),
        blocks=len(facts["blocks"]),
    )
    choice = choose_runtime(session, facts, setting)
    session = choice.session
    found = choose_recipes(session, facts, choice.start or baseline)
    setting = replace(setting, start=choice.start, precisions=found.plans, ordered=found.measured)
    plans = _forecast(session, facts, baseline, setting)
    trials = [] if plans.met or _enough(setting) else _search(session, setting, plans)
    certified = certify_and_judge(session, trials, baseline, setting)
    honest = within_noise(certified.verdict, facts["spread"], tuple(facts["notes"]))
    certified = replace(certified, verdict=honest)
    return finish(session, facts, baselines, plans, trials, certified, (choice.data, found.data))


def _enough(setting: Setting) -> bool:
    """Tell whether the change of runtime or precision alone keeps every limit on cost, and quality holds."""
    start = setting.start
    return start is not None and bool(setting.budget.costs) and start.feasible and setting.passes(start)


def _survey(session: Session) -> dict[str, Any]:
    session.say(Line.phase("looking at the model"))
    start = time.perf_counter()
    limits = candidate_limits(session.budget.time)
    finished = session.executor.run(
        survey,
        session.target,
        session.folder,
        candidate_seed(session.seed, "survey"),
        session.budget.time is not None,
        limits=limits,
        name="survey",
        say=session.say,
    )
    return _value(finished) | {"wall": time.perf_counter() - start}


def _value(finished: Finished) -> dict[str, Any]:
    """Return what a job that must succeed returned; raise what went wrong."""
    if finished.value is not None:
        return finished.value
    if finished.refusal is not None:
        raise refused_from(finished.refusal)
    raise Refused(
        "the model can be surveyed",
        value=f"{finished.status}: {finished.reason} {finished.detail}",
        place="survey",
        fix=f"see {finished.log}" if finished.log else "",
    )


def _baseline(session: Session, facts: dict[str, Any]) -> dict[str, Any]:
    session.say(Line.phase("measuring the original"))
    start = time.perf_counter()
    operations = Operations.model_validate(facts["operations"])
    counts = {REFERENCE: operations, "eager": operations}
    results = measure_candidates(session, {}, counts, "valid", eager=facts["eager"])
    mine = results[REFERENCE]
    seconds = {"measurement": time.perf_counter() - start}
    key = session.key("trial", [])
    blank = Trial(key=key, name=plan_name(()), plan=[], status="done", folder="float", seconds=seconds)
    expected = np.load(session.path("float", "expected.npy"), allow_pickle=False)
    apart = apart_from_memory(mine, expected, facts["noise"])
    trial = judge(session, mine, mine, apart, blank, blank)
    if trial.status == "failed":
        raise Refused(
            "the exported model agrees with the model",
            value=trial.reason,
            place="export",
            fix="report the model's operators; nothing can be certified on a wrong export",
        )
    eager = results["eager"].measurement.model_dump(mode="json") if "eager" in results else None
    return {"trial": trial.model_dump(mode="json"), "eager": eager, "notes": _reaction(session, mine)}


def _reaction(session: Session, measured: Measured) -> list[str]:
    """Return a note where the metric is the same whatever the outputs are."""
    try:
        note = reacts(session.task, measured.outputs, session.task.valid.arrays()[1])
    except Refused:  # defined on the model's outputs but not on shuffled ones: it reacts
        return []
    return [note] if note else []


def _forecast(session: Session, facts: dict[str, Any], baseline: Trial, setting: Setting) -> Forecast:
    """Say what the budget means here; probe what could be reached where that is cheap."""

    def work() -> dict[str, Any]:
        timing = Timing(
            survey=facts["wall"] - facts["seconds"].get("training", 0.0),
            measurement=baseline.seconds["measurement"],
            epoch=facts["epoch_seconds"],
            spent=session.elapsed,
        )
        assert baseline.measurement is not None
        certifiable = _certifiable(session)
        plain = forecast(session.budget, baseline.measurement, timing, certifiable, "")
        floor = _floor(session, setting, baseline, plain)
        timing = timing.model_copy(update={"spent": session.elapsed})
        told = forecast(session.budget, baseline.measurement, timing, certifiable, floor)
        return told.model_dump(mode="json")

    content = session.once("forecast", None, work)
    plans = Forecast.model_validate({k: v for k, v in content.items() if k != "elapsed"})
    _announce(session, plans, setting)
    return plans


def _certifiable(session: Session) -> tuple[float, int | None]:
    """Return the smallest drop that the test examples can certify, and how many the asked one needs."""
    n, confidence, asked = len(session.task.test), session.budget.confidence, session.budget.max_drop
    if asked is None:
        return 0.0, None
    needed = needed_examples(asked, 0.0, confidence)
    return smallest_certifiable_drop(n, 0.0, confidence), needed if needed > n else None


def _floor(session: Session, setting: Setting, baseline: Trial, plans: Forecast) -> Measurement | str:
    """Build and measure the smallest model, untrained, or say why not."""
    time_left = session.budget.time
    plan = floor_plan(setting.precisions, setting.prunable)
    if plans.met or _enough(setting) or not session.budget.costs:
        return "there is nothing to search"
    if plan is None:
        return "nothing here makes this model cheaper"
    if time_left is not None and plans.cheap_seconds > FLOOR_SHARE * time_left:
        return "no time"
    limits = candidate_limits(_patience(plans, time_left))
    trial = evaluate(session, plan, baseline, limits, "probing what can be reached:")
    return trial.measurement or f"{trial.name}: {trial.reason}"


def _patience(plans: Forecast, left: float | None) -> float:
    """Return the seconds after which a candidate is taken to hang, or the time is up."""
    limit = max(LEAST_PATIENCE, PATIENCE * plans.trial_seconds)
    return limit if left is None else min(limit, left)


def _announce(session: Session, plans: Forecast, setting: Setting) -> None:
    for line in plans.lines:
        session.say(Line.note(f"limit {line.name}: {line.words}"))
    if session.budget.max_drop is not None:
        session.say(Line.note(f"limit max_drop: {session.budget.max_drop * 100:g} points"))
    if plans.met:
        session.say(
            Line.note("the float model in the target keeps every limit on cost already: nothing to search")
        )
    elif setting.start is not None and _enough(setting):
        session.say(Line.note(f"{setting.start.name}, keeps every limit on cost already: nothing to search"))
    else:
        text = f"a trial takes about {plans.trial_seconds:.0f} s with {plans.epochs:g} epochs of recovery"
        session.say(Line.note(text))
    for warning in plans.warnings:
        session.say(Line.warning(f"warning: {warning}"))


def _search(session: Session, setting: Setting, plans: Forecast) -> list[Trial]:
    options = _affordable(session, plans)
    trials: list[Trial] = []

    def left() -> float:
        budget = session.budget.time
        return float("inf") if budget is None else budget - session.elapsed - plans.reserve_seconds

    def one(plan: Plan) -> Trial:
        return evaluate(session, plan, setting.baseline, candidate_limits(_patience(plans, left())))

    start = [] if setting.start is None else [setting.start]
    planner = bisection(setting, options)
    for trial in search(planner, one, session.budget, left, partial(_next_seconds, plans)):
        trials.append(trial)
        session.say(Line.trial(_line(trial)))
        write_best(session, [t for t in [*start, *trials] if setting.passes(t)] or [setting.baseline])
    return trials


def _affordable(session: Session, plans: Forecast) -> Bisection:
    """Fix the epochs; compare levers where trials and time allow and the user did not choose."""
    options, budget = session.options, session.budget
    probes = len(ROUNDINGS) + 1
    slow = budget.time is not None and probes * plans.cheap_seconds > FLOOR_SHARE * budget.time
    few = budget.trials is not None and budget.trials < PROBED_TRIALS
    wanted = {} if slow or few else {"round_to": ROUNDINGS, "compare": True}
    free = {name: value for name, value in wanted.items() if name not in options.model_fields_set}
    return options.model_copy(update={"epochs": options.epochs or plans.epochs, **free})


def _next_seconds(plans: Forecast, plan: Plan, done: list[Trial]) -> float:
    """Forecast a plan: what comes with any trial, and training at the pace of the last one that trained."""
    epochs = epochs_of(plan)
    pace = (plans.trial_seconds - plans.cheap_seconds) / plans.epochs
    for trial in done:
        if trial.seconds.get("training"):
            pace = trial.seconds["training"] / epochs_of(plan_from_json(trial.plan))
    return plans.cheap_seconds + epochs * pace


def _line(trial: Trial) -> str:
    if trial.status == "failed":
        return f"failed: {trial.name}: {trial.reason}"
    drop = "undefined" if trial.drop is None else f"{trial.drop * 100:+.2f} points lost"
    speed = "not measured" if trial.latency_ms is None else f"{trial.latency_ms:.3g} ms"
    broken = f"; breaks {', '.join(sorted(trial.breaks))}" if trial.breaks else ""
    return f"done: {trial.name}: {drop}, {speed}{broken}"
