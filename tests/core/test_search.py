"""The search loop: every trial is told, and every limit on spending ends it."""

import math

import pytest

from penjing.core.budget import Budget
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured
from penjing.core.search import search
from penjing.core.trial import ROUNDING, Trial, find_broken_limits, get_cost


def planner(log, end=10):
    for number in range(end):
        told = yield (number,)
        log.append((number, told))


def trial(number):
    return Trial(key=str(number), name="", plan=[], status="done")


def walk(
    budget,
    *,
    end=10,
    left=lambda: math.inf,
    forecast=lambda plan, done: 0.0,
    evaluate=lambda plan: trial(plan[0]),
):
    log = []
    found = list(search(planner(log, end), evaluate, budget, left, forecast))
    return [int(t.key) for t in found], log


def test_the_planner_is_told_of_each_trial_and_ends_the_search():
    found, log = walk(Budget(), end=3)
    assert found == [0, 1, 2]
    assert [(n, t.key) for n, t in log] == [(0, "0"), (1, "1"), (2, "2")]


def test_a_planner_that_proposes_nothing_ends_at_once():
    assert walk(Budget(), end=0) == ([], [])


@pytest.mark.parametrize("trials", [1, 4])
def test_the_limit_on_trials_is_kept_exactly(trials):
    found, log = walk(Budget(trials=trials))
    assert found == list(range(trials))
    assert len(log) == trials


def test_no_trial_starts_that_would_not_fit_the_time():
    clock = iter([10.0, 7.0, 4.0, 1.0])
    found, _ = walk(Budget(), left=lambda: next(clock), forecast=lambda plan, done: 3.0 if done else 0.0)
    assert found == [0, 1, 2]


def test_the_forecast_learns_from_all_trials_so_far():
    seen = []
    walk(Budget(trials=3), forecast=lambda plan, done: seen.append(len(done)) or 0.0)
    assert seen == [0, 1, 2]


def test_trials_come_one_at_a_time():
    done = []
    steps = search(
        planner([]), lambda plan: done.append(plan) or trial(plan[0]), Budget(), lambda: 1.0, lambda p, d: 0.0
    )
    next(steps)
    assert done == [(0,)]
    steps.close()
    assert done == [(0,)]


def test_a_defect_in_an_evaluation_passes_through():
    def evaluate(plan):
        raise next(iter([StopIteration()]))

    with pytest.raises(RuntimeError):
        walk(Budget(), evaluate=evaluate)

    def refuse(plan):
        raise Refused("rule", fix="fix")

    with pytest.raises(Refused):
        walk(Budget(), evaluate=refuse)


def estimate(value):
    return Estimate(value=value, low=value, high=value, n=1)


def measured(ms=2.0, size=100, memory=None, ratio=None):
    latency = Latency(
        p50_ms=estimate(ms),
        p95_ms=estimate(ms),
        p99_ms=estimate(ms),
        throughput_per_s=estimate(1),
        ratio=None if ratio is None else estimate(ratio),
        batch=1,
        threads=1,
        calls=1,
        rounds=1,
    )
    return Measurement(
        name="",
        target="",
        split="valid",
        metric="accuracy",
        quality=estimate(0.9),
        latency=latency,
        size_bytes=size,
        memory_bytes=NotMeasured(reason="off") if memory is None else estimate(memory),
    )


def test_broken_limits_carry_how_far_they_are_broken():
    baseline, now = measured(ms=4.0, size=400), measured(ms=2.0, size=100)
    assert find_broken_limits(Budget(latency="1ms", size="50%"), now, baseline, None) == {"latency": 2.0}
    assert find_broken_limits(Budget(latency="60%", size="20%"), now, baseline, None) == {
        "size": pytest.approx(1.25)
    }
    assert find_broken_limits(Budget(max_drop="1%"), now, baseline, 0.03) == {"max_drop": pytest.approx(3)}
    assert find_broken_limits(Budget(max_drop="1%"), now, baseline, -0.5) == {}


def test_a_relative_latency_is_judged_by_the_interleaved_ratio():
    baseline, now = measured(ms=4.0), measured(ms=2.0, ratio=0.7)
    assert find_broken_limits(Budget(latency="60%"), now, baseline, None) == {
        "latency": pytest.approx(0.7 / 0.6)
    }
    assert find_broken_limits(Budget(latency="2.5ms"), now, baseline, None) == {}


def test_what_was_not_measured_is_broken_never_kept():
    assert find_broken_limits(Budget(memory="1GB"), measured(), measured(), None) == {"memory": 1e9}
    assert find_broken_limits(Budget(memory="50%"), measured(memory=1), measured(), None) == {"memory": 1e9}
    assert find_broken_limits(Budget(operations="1M"), measured(), measured(), None) == {"operations": 1e9}
    assert find_broken_limits(Budget(max_drop="1%"), measured(), measured(), None) == {"max_drop": 1e9}
    assert get_cost(measured(), "memory") is None
    assert get_cost(measured(memory=7), "memory") == 7


def test_a_drop_equal_to_the_limit_keeps_it_whatever_floats_make_of_it():
    drop = 0.93 - 0.92
    assert drop > 0.01
    assert find_broken_limits(Budget(max_drop="1%"), measured(), measured(), drop) == {}
    assert find_broken_limits(Budget(max_drop="1%"), measured(), measured(), 0.01 * (1 + 3 * ROUNDING))
