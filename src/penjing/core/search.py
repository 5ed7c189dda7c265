"""The search: a planner proposes, trials answer, and the limits on spending end it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from penjing.core.budget import Budget
from penjing.core.plan import Plan
from penjing.core.trial import Trial

Planner = Generator[Plan, Trial, None]
"""Yields a plan, is sent the trial of that plan, and returns when it has nothing better to propose."""


def search(
    planner: Planner,
    evaluate: Callable[[Plan], Trial],
    budget: Budget,
    seconds_left: Callable[[], float],
    seconds_of: Callable[[Plan, list[Trial]], float],
) -> Iterator[Trial]:
    """Walk a planner until it ends, the trials are used up, or the next one would not fit the time.

    Args:
        planner: the generator of plans.
        evaluate: carries one plan out; a failure is a trial with status `failed`, never an exception.
        budget: its `trials` bounds the number of plans tried.
        seconds_left: what remains for the search, the time for certification already set aside.
        seconds_of: forecasts what a plan will take, from the trials already done.
    """
    done: list[Trial] = []
    plan = next(planner, None)
    while plan is not None and not _is_over(plan, done, budget, seconds_left, seconds_of):
        trial = evaluate(plan)
        done.append(trial)
        yield trial
        plan = _send(planner, trial)


def _send(planner: Planner, trial: Trial) -> Plan | None:
    try:
        return planner.send(trial)
    except StopIteration:
        return None


def _is_over(
    plan: Plan,
    done: list[Trial],
    budget: Budget,
    seconds_left: Callable[[], float],
    seconds_of: Callable[[Plan, list[Trial]], float],
) -> bool:
    if budget.trials is not None and len(done) >= budget.trials:
        return True
    return seconds_left() < seconds_of(plan, done)
