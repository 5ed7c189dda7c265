"""The main job: a model, its data and a budget in; the fastest artefact that keeps to it out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from penjing.core.budget import Budget
from penjing.core.plan import Plan, plan_from_json
from penjing.core.progress import Line
from penjing.core.search import search
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.trial import Trial
from penjing.core.value import Model
from penjing.measurement.nondeterminism import within_noise
from penjing.planners.bisection import ROUNDINGS, Bisection, Setting, bisect
from penjing.planners.forecast import Forecast
from penjing.planners.recovery import count_epochs, plan_repair
from penjing.search.baseline import measure_baseline
from penjing.search.certification import certify_and_judge
from penjing.search.evaluate import evaluate
from penjing.search.forecast import FLOOR_SHARE, forecast_search, is_enough, limit_trial_seconds
from penjing.search.open_session import open_session
from penjing.search.recipes import choose_recipes
from penjing.search.record import Ending, finish, write_best
from penjing.search.resources import limit_candidate
from penjing.search.result import Result
from penjing.search.runtimes import choose_runtime
from penjing.search.session import Session
from penjing.search.survey import is_surveyed, survey_original
from penjing.search.values import Baselines, Survey

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
    survey = session.once("survey", None, Survey, partial(survey_original, session))
    if not is_surveyed(session):
        survey_original(session)
    session.task.check_labels(survey.outputs)
    baselines = session.once("baseline", None, Baselines, partial(measure_baseline, session, survey))
    baseline, asked = baselines.trial, session.target
    write_best(session, [baseline])
    setting = _setting(session, survey, baseline)
    runtime = choose_runtime(session, survey, setting)
    session = runtime.session
    recipes = choose_recipes(session, survey, runtime.start or baseline)
    setting = replace(setting, start=runtime.start, precisions=recipes.plans, ordered=recipes.measured)
    forecast = forecast_search(session, survey, baseline, setting)
    trials = [] if forecast.met or is_enough(setting) else _search(session, setting, forecast)
    judged = certify_and_judge(session, trials, baseline, setting)
    judged = replace(judged, verdict=within_noise(judged.verdict, survey.spread, survey.notes))
    ending = Ending(survey, baselines, forecast, runtime.found, recipes.found, trials, judged)
    return finish(session, asked, ending)


def _setting(session: Session, survey: Survey, baseline: Trial) -> Setting:
    return Setting(
        budget=session.budget,
        baseline=baseline,
        precisions=(),
        prunable=any(group.size > 1 for group in survey.groups),
        repair=plan_repair(survey.kinds.values(), survey.backend),
        trainable=survey.epoch_seconds is not None,
        training_precision=survey.precision or "float32",
        n_test=len(session.task.test),
        widths=tuple(group.size for group in survey.groups),
        blocks=len(survey.blocks),
    )


def _search(session: Session, setting: Setting, plans: Forecast) -> list[Trial]:
    options = _affordable(session, plans)
    trials: list[Trial] = []

    def left() -> float:
        budget = session.budget.time
        return float("inf") if budget is None else budget - session.elapsed - plans.reserve_seconds

    def one(plan: Plan) -> Trial:
        return evaluate(session, plan, setting.baseline, limit_candidate(limit_trial_seconds(plans, left())))

    start = [] if setting.start is None else [setting.start]
    planner = bisect(setting, options)
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
    epochs = count_epochs(plan)
    pace = (plans.trial_seconds - plans.cheap_seconds) / plans.epochs
    for trial in done:
        if trial.seconds.get("training"):
            pace = trial.seconds["training"] / count_epochs(plan_from_json(trial.plan))
    return plans.cheap_seconds + epochs * pace


def _line(trial: Trial) -> str:
    if trial.status == "failed":
        return f"failed: {trial.name}: {trial.reason}"
    drop = "undefined" if trial.drop is None else f"{trial.drop * 100:+.2f} points lost"
    speed = "not measured" if trial.latency_ms is None else f"{trial.latency_ms:.3g} ms"
    broken = f"; breaks {', '.join(sorted(trial.breaks))}" if trial.breaks else ""
    return f"done: {trial.name}: {drop}, {speed}{broken}"
