"""What a budget means in absolute numbers, whether it looks reachable, and how long a trial takes."""

from __future__ import annotations

from pydantic import Field

from penjing.core.budget import COSTS, Budget, say
from penjing.core.measurement import Measurement
from penjing.core.trial import get_cost
from penjing.core.value import Value
from penjing.measurement.certifiable import Certifiable

TRAINED_TRIALS = 4
"""Trials with recovery that a time budget is divided into where it suffices."""

EPOCHS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
"""Lengths of recovery that a plan may have; a forecast rounds down to one of them."""

ENOUGH = 2.0
"""Epochs below which fewer trials with longer recovery are the better use of the time."""

WITHOUT_TIME = 3.0
"""Epochs of recovery where the budget sets no time."""


class LimitForecast(Value):
    """One limit: what it means here, where the baseline stands, and what was seen of reaching it."""

    name: str
    limit: float
    baseline: float | None
    unit: str
    met: bool
    words: str


class Forecast(Value):
    """Said before the search starts, and kept so that a resumed run plans the same.

    Attributes:
        lines: one for each limit.
        met: every limit on cost is kept by the float model in the target already.
        epochs: of recovery in a trial.
        trial_seconds: of a trial with recovery; `cheap_seconds` of one without.
        reserve_seconds: kept for certification and the report.
        warnings: what the user should know before waiting.
    """

    lines: tuple[LimitForecast, ...]
    met: bool
    epochs: float
    trial_seconds: float
    cheap_seconds: float
    reserve_seconds: float
    warnings: tuple[str, ...] = Field(default=())


class Timing(Value):
    """What the survey took: the basis of the forecast, all in seconds."""

    survey: float
    measurement: float
    epoch: float | None
    spent: float


def forecast(
    budget: Budget,
    baseline: Measurement,
    timing: Timing,
    certifiable: Certifiable,
    floor: Measurement | str,
) -> Forecast:
    """Translate a budget.

    Args:
        budget: the user's.
        baseline: the float model in the target.
        timing: what survey and first measurement took.
        certifiable: what the test examples can certify if no prediction changes.
        floor: the smallest model that was built and measured without training, or why there is none.
    """
    lines = tuple(_line(name, budget, baseline, floor) for name in budget.costs)
    cheap = timing.survey + timing.measurement
    reserve = 2.0 + 2.5 * timing.measurement
    epochs = _epochs(budget, timing, cheap, reserve)
    trial = cheap + epochs * (timing.epoch or 0.0)
    warnings = []
    smallest, needed, no_bound = certifiable
    if no_bound:
        warnings.append(f"max_drop will stay inconclusive, no bound on the metric: {no_bound}")
    if budget.max_drop is not None and needed is not None:
        warnings.append(
            f"{budget.max_drop * 100:g} points cannot be certified with these test examples even if no "
            f"prediction changes (smallest: {smallest * 100:.2g} points); {needed} examples would do"
        )
    if budget.time is not None and timing.spent + cheap + reserve > budget.time:
        warnings.append(
            f"{say(budget.time, 's')} is hardly enough: survey, one trial and certification take about "
            f"{say(timing.spent + cheap + reserve, 's')}"
        )
    met = bool(lines) and all(line.met for line in lines)
    return Forecast(
        lines=lines,
        met=met,
        epochs=epochs,
        trial_seconds=trial,
        cheap_seconds=cheap,
        reserve_seconds=reserve,
        warnings=tuple(warnings),
    )


def _line(name: str, budget: Budget, baseline: Measurement, floor: Measurement | str) -> LimitForecast:
    limit, unit, base = budget.costs[name], COSTS[name], get_cost(baseline, name)
    if base is None and limit.relative:
        return LimitForecast(
            name=name,
            limit=limit.value,
            baseline=None,
            unit="share",
            met=False,
            words=f"{limit}; the baseline's {name} was not measured",
        )
    bound = limit.absolute(base or 0.0)
    share = "" if not base else f", {bound / base * 100:.0f}% of the baseline's {say(base, unit)}"
    met = base is not None and base <= bound
    hint = " (kept already)" if met else _looks(name, bound, floor)
    return LimitForecast(
        name=name, limit=bound, baseline=base, unit=unit, met=met, words=f"{say(bound, unit)}{share}{hint}"
    )


def _looks(name: str, bound: float, floor: Measurement | str) -> str:
    """Judge a limit by the smallest model that was built and measured, untrained."""
    if isinstance(floor, str):
        return f" (not probed whether it can be reached: {floor})"
    lowest = get_cost(floor, name)
    if lowest is None:
        return ""
    seen = f"the smallest model probed has {say(lowest, COSTS[name])}"
    return f" (looks reachable: {seen})" if lowest <= bound else f" (looks out of reach: {seen})"


def _epochs(budget: Budget, timing: Timing, cheap: float, reserve: float) -> float:
    if timing.epoch is None:
        return EPOCHS[0]
    if budget.time is None:
        return WITHOUT_TIME
    left = budget.time - timing.spent - reserve - cheap
    for trials in range(TRAINED_TRIALS, 0, -1):
        afford = (left / trials - cheap) / max(timing.epoch, 1e-6)
        epochs = max((e for e in EPOCHS if e <= afford), default=0.0)
        if epochs >= ENOUGH:
            return epochs
    return epochs or EPOCHS[0]
