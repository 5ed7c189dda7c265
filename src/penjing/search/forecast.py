"""Before the search: what the budget means here, whether it looks reachable, how long a trial takes."""

from __future__ import annotations

from penjing.core.measurement import Measurement
from penjing.core.progress import Line
from penjing.core.trial import Trial
from penjing.measurement.certifiable import certifiable
from penjing.planners.bisection import Setting
from penjing.planners.floor import plan_smallest_model
from penjing.planners.forecast import Forecast, Timing, forecast
from penjing.search.evaluate import evaluate
from penjing.search.resources import limit_candidate
from penjing.search.session import Session
from penjing.search.values import Survey

PATIENCE, LEAST_PATIENCE = 20.0, 300.0
"""A candidate may take so many times the forecast of a trial, and at least so many seconds."""

FLOOR_SHARE = 0.1
"""The probe of what can be reached may take this share of the time."""


def forecast_search(session: Session, survey: Survey, baseline: Trial, setting: Setting) -> Forecast:
    """Say what the budget means here; probe what could be reached where that is cheap."""

    def work() -> Forecast:
        timing = Timing(
            survey=survey.wall - survey.seconds.get("training", 0.0),
            measurement=baseline.seconds["measurement"],
            epoch=survey.epoch_seconds,
            spent=session.elapsed,
        )
        assert baseline.measurement is not None
        found = certifiable(session.task, session.budget.max_drop, session.budget.confidence)
        plain = forecast(session.budget, baseline.measurement, timing, found, "")
        floor = _floor(session, setting, baseline, plain)
        timing = timing.model_copy(update={"spent": session.elapsed})
        return forecast(session.budget, baseline.measurement, timing, found, floor)

    plans = session.once("forecast", None, Forecast, work)
    _announce(session, plans, setting)
    return plans


def _floor(session: Session, setting: Setting, baseline: Trial, plans: Forecast) -> Measurement | str:
    """Build and measure the smallest model, untrained, or say why not."""
    time_left = session.budget.time
    plan = plan_smallest_model(setting.precisions, setting.prunable)
    if plans.met or is_enough(setting) or not session.budget.costs:
        return "there is nothing to search"
    if plan is None:
        return "nothing here makes this model cheaper"
    if time_left is not None and plans.cheap_seconds > FLOOR_SHARE * time_left:
        return "no time"
    limits = limit_candidate(limit_trial_seconds(plans, time_left))
    trial = evaluate(session, plan, baseline, limits, "probing what can be reached:")
    return trial.measurement or f"{trial.name}: {trial.reason}"


def limit_trial_seconds(plans: Forecast, left: float | None) -> float:
    """Return the seconds after which a candidate is taken to hang, or the time is up."""
    limit = max(LEAST_PATIENCE, PATIENCE * plans.trial_seconds)
    return limit if left is None else min(limit, left)


def _announce(session: Session, plans: Forecast, setting: Setting) -> None:
    for limit in plans.lines:
        session.say(Line.note(f"limit {limit.name}: {limit.words}"))
    if session.budget.max_drop is not None:
        session.say(Line.note(f"limit max_drop: {session.budget.max_drop * 100:g} points"))
    if plans.met:
        session.say(
            Line.note("the float model in the target keeps every limit on cost already: nothing to search")
        )
    elif setting.start is not None and is_enough(setting):
        session.say(Line.note(f"{setting.start.name}, keeps every limit on cost already: nothing to search"))
    else:
        text = f"a trial takes about {plans.trial_seconds:.0f} s with {plans.epochs:g} epochs of recovery"
        session.say(Line.note(text))
    for warning in plans.warnings:
        session.say(Line.warning(f"warning: {warning}"))


def is_enough(setting: Setting) -> bool:
    """Tell whether the change of runtime or precision alone keeps every limit on cost, and quality holds."""
    start = setting.start
    return start is not None and bool(setting.budget.costs) and start.feasible and setting.passes(start)
