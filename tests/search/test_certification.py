"""Which candidates are tested in which order, which one is delivered, and how limits are judged."""

import pytest

import penjing as pj
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured, Operations
from penjing.core.trial import Trial
from penjing.core.verdict import Certificate
from penjing.search.certification import Used, choose_candidate, judge_limits, order_candidates


def estimate(value, spread=0.0, unit=""):
    return Estimate(value=value, low=value - spread, high=value + spread, n=30, unit=unit)


def latency(ms, spread=0.0, ratio=None):
    p = estimate(ms, spread, "ms")
    return Latency(
        p50_ms=p,
        p95_ms=p,
        p99_ms=p,
        throughput_per_s=estimate(1000 / ms),
        ratio=ratio,
        reference="float",
        batch=1,
        threads=1,
        calls=100,
        rounds=10,
    )


def measurement(ms=1.0, spread=0.0, quality=0.9, size=1000, ratio=None, macs=100, memory=10**8):
    return Measurement(
        name="m",
        target="onnxruntime",
        split="test",
        metric="accuracy",
        quality=estimate(quality),
        latency=latency(ms, spread, ratio) if ms is not None else NotMeasured(reason="the clock broke"),
        memory_bytes=estimate(memory) if memory else NotMeasured(reason="no /proc here"),
        size_bytes=size,
        operations=Operations(parameters=10, multiply_adds=macs),
    )


def trial(name, ms, drop, breaks=None, plan=({"method": "Int8Static"},), status="done"):
    return Trial(
        key=name,
        name=name,
        plan=list(plan),
        status=status,
        drop=drop,
        flips=abs(drop),
        measurement=measurement(ms),
        breaks=breaks or {},
        folder=name,
    )


BASE = trial("float", 1.0, 0.0, plan=())


def test_candidates_go_from_safest_to_fastest_after_the_float_model():
    trials = [trial("fast", 0.3, 0.008), trial("slow", 0.6, 0.001), trial("middle", 0.4, 0.004)]
    names = [t.name for t in order_candidates(trials, BASE, lambda t: True)]
    assert names == ["float", "slow", "middle", "fast"]


def test_dominated_failed_and_hopeless_trials_are_not_tested():
    trials = [
        trial("good", 0.3, 0.001),
        trial("dominated", 0.5, 0.002),
        trial("hopeless", 0.1, 0.5),
        trial("failed", 0.1, 0.0, status="failed"),
    ]
    names = [
        t.name for t in order_candidates(trials, BASE, lambda t: t.status == "done" and (t.drop or 0) < 0.01)
    ]
    assert names == ["float", "good"]


def test_a_trial_that_keeps_every_limit_comes_before_a_faster_one_that_does_not():
    trials = [trial("fast and large", 0.3, 0.001, breaks={"size": 1.5}), trial("small", 0.6, 0.001)]
    assert [t.name for t in order_candidates(trials, BASE, lambda t: True)] == ["float", "small"]
    assert [t.name for t in order_candidates(trials[:1], BASE, lambda t: True)] == ["float", "fast and large"]


def test_a_slower_model_is_only_wanted_where_the_float_model_breaks_a_limit():
    slower = [trial("slower and smaller", 1.2, 0.0)]
    large = BASE.model_copy(update={"breaks": {"size": 4.0}})
    assert [t.name for t in order_candidates(slower, BASE, lambda t: True)] == ["float"]
    assert [t.name for t in order_candidates(slower, large, lambda t: True)] == [
        "float",
        "slower and smaller",
    ]


def test_only_the_fastest_few_are_tested():
    trials = [trial(f"t{i}", 1 - i / 10, i / 1000) for i in range(8)]
    found = order_candidates(trials, BASE, lambda t: True)
    assert [t.name for t in found] == ["float", "t4", "t5", "t6", "t7"]


def test_the_last_certified_candidate_is_delivered_and_the_float_model_where_none_is():
    candidates = [BASE, trial("a", 0.5, 0.0), trial("b", 0.3, 0.0)]
    budget = pj.Budget(max_drop="1%")
    assert choose_candidate(candidates, 2, budget) == 2
    assert choose_candidate(candidates, None, budget) == 0


def test_without_a_limit_on_quality_the_costs_decide_first_and_quality_second():
    candidates = [
        BASE.model_copy(update={"breaks": {"size": 4.0}}),
        trial("small and bad", 0.3, 0.4),
        trial("small and good", 0.5, 0.01),
        trial("too large", 0.2, 0.0, breaks={"size": 1.5}),
    ]
    assert candidates[choose_candidate(candidates, None, pj.Budget(size="25%"))].name == "small and good"


@pytest.mark.parametrize(
    ("ratio", "status"),
    [((0.5, 0.45, 0.55), "reached"), ((0.7, 0.65, 0.75), "not_reached"), ((0.6, 0.55, 0.65), "inconclusive")],
)
def test_relative_latency_is_judged_by_the_interval_of_the_ratio(ratio, status):
    value, low, high = ratio
    paired = Estimate(value=value, low=low, high=high, n=10)
    result = measurement(ms=value, ratio=paired)
    found = judge_limits(pj.Budget(latency="60%"), result, measurement(1.0), None, Used(1.0, 1))
    assert found.limits["latency"].status == status
    assert found.status == status
    assert found.limits["latency"].limit == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("ms", "spread", "status"), [(4, 0.5, "reached"), (6, 0.5, "not_reached"), (5, 0.5, "inconclusive")]
)
def test_absolute_latency_is_judged_by_its_own_interval(ms, spread, status):
    found = judge_limits(
        pj.Budget(latency="5ms"), measurement(ms, spread), measurement(10.0), None, Used(1.0, 1)
    )
    assert found.limits["latency"].status == status


def test_what_was_not_measured_is_inconclusive_with_the_reason_and_never_zero():
    budget = pj.Budget(latency="60%", memory="50%")
    found = judge_limits(budget, measurement(ms=None, memory=None), measurement(1.0), None, Used(1.0, 1))
    assert {limit.status for limit in found.limits.values()} == {"inconclusive"}
    assert found.limits["latency"].measured is None
    assert "the clock broke" in found.limits["latency"].reason
    assert "no /proc here" in found.limits["memory"].reason


def test_sizes_operations_time_and_trials_are_exact():
    budget = pj.Budget(size="50%", operations="25%", time="1min", trials=3)
    found = judge_limits(budget, measurement(size=500, macs=26), measurement(), None, Used(59.0, 3))
    statuses = {name: limit.status for name, limit in found.limits.items()}
    assert statuses == {
        "size": "reached",
        "operations": "not_reached",
        "time": "reached",
        "trials": "reached",
    }
    assert found.status == "not_reached"
    late = judge_limits(
        pj.Budget(size="50%", time="1min"), measurement(size=500), measurement(), None, Used(61.0, 3)
    )
    assert late.limits["time"].status == "not_reached"


@pytest.mark.parametrize(("seconds", "status"), [(59.0, "inconclusive"), (61.0, "not_reached")])
def test_time_of_which_a_part_is_not_known_is_never_called_kept(seconds, status):
    used = Used(seconds, 1, all_time_known=False)
    found = judge_limits(pj.Budget(size="50%", time="1min"), measurement(), measurement(), None, used)
    assert found.limits["time"].status == status
    assert found.limits["time"].low == seconds


def test_quality_is_judged_by_the_certificate():
    certificate = Certificate(
        candidate="m",
        metric="accuracy",
        max_drop=0.01,
        n=1000,
        confidence=0.95,
        method="exact",
        drop=Estimate(value=0.02, low=0.015, high=0.03, n=1000),
    )
    found = judge_limits(pj.Budget(max_drop="1%"), measurement(), measurement(), certificate, Used(1.0, 1))
    assert found.limits["max_drop"].status == "not_reached"
    assert found.limits["max_drop"].baseline == pytest.approx(0.9)
