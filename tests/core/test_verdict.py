"""Each limit gets one of three answers, and the verdict joins them."""

from __future__ import annotations

import pytest

from penjing.core.measurement import Estimate
from penjing.core.verdict import Certificate, LimitVerdict, Step, Verdict, drop_in_words, judge_upper


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=100, unit="ms")


def certificate(
    drop: Estimate, certified: bool, max_drop: float | None = 0.01, needed: int | None = None
) -> Certificate:
    step = Step(name="a", drop=drop.value, upper=drop.high, p_value=0.5, certified=certified)
    return Certificate(
        candidate="a",
        metric="accuracy",
        max_drop=max_drop,
        n=100,
        confidence=0.95,
        method="exact",
        drop=drop,
        needed_n=needed,
        sequence=(step,),
    )


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (1, 2, "reached"),
        (1, 3, "reached"),
        (3.1, 4, "not_reached"),
        (3, 4, "inconclusive"),
        (2, 4, "inconclusive"),
    ],
)
def test_a_cost_is_judged_by_its_whole_interval(low: float, high: float, status: str):
    verdict = judge_upper(3.0, estimate(low, (low + high) / 2, high), baseline=9.0)
    assert (verdict.status, verdict.unit, verdict.baseline) == (status, "ms", 9.0)
    assert bool(verdict.reason) == (status == "inconclusive")


def test_quality_is_judged_by_the_test_and_its_lower_bound():
    assert certificate(estimate(-0.01, 0.0, 0.005), True).judge(0.01).status == "reached"
    assert certificate(estimate(0.02, 0.03, 0.04), False).judge(0.01).status == "not_reached"
    unsure = certificate(estimate(0.0, 0.002, 0.02), False, needed=1234).judge(0.01)
    assert unsure.status == "inconclusive"
    assert unsure.reason == "cannot certify a drop of at most 1% with 100 examples; 1,300 would do"
    hopeless = certificate(estimate(0.0, 0.015, 0.02), False).judge(0.01)
    assert hopeless.reason.endswith("the measured drop is not below it")


def test_a_bound_within_the_limit_does_not_replace_a_test_that_was_not_passed():
    assert certificate(estimate(-0.01, 0.0, 0.005), False).judge(0.01).status == "inconclusive"
    assert certificate(estimate(-0.01, 0.0, 0.005), False, max_drop=None).judge(0.01).status == "reached"


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ((), "reached"),
        (("reached", "reached"), "reached"),
        (("reached", "inconclusive"), "inconclusive"),
        (("inconclusive", "not_reached", "reached"), "not_reached"),
    ],
)
def test_the_verdict_is_as_good_as_its_worst_limit(found: tuple[str, ...], status: str):
    limits = {str(i): LimitVerdict(status=s, limit=1.0) for i, s in enumerate(found)}  # type: ignore[arg-type]
    assert Verdict.of(limits).status == status


def test_the_text_shows_each_limit_in_its_unit():
    limits = {
        "latency": judge_upper(5.0, estimate(4.0, 4.2, 4.4), 10.0),
        "size": LimitVerdict(status="not_reached", limit=1e6, measured=2e6, low=2e6, high=2e6, unit="bytes"),
        "memory": LimitVerdict(status="inconclusive", limit=1e6, unit="bytes", reason="was not measured"),
    }
    lines = str(Verdict.of(limits)).splitlines()
    assert lines[0] == "Verdict: not reached"
    assert lines[2].split("  ")[1:3] == ["latency", "reached"]
    assert "4 ms to 4.4 ms" in lines[2]
    assert "2 MB" in lines[3]
    assert "to" not in lines[3]
    assert lines[4].split()[-2:] == ["-", "-"]
    assert lines[5] == "  memory: was not measured"


def test_drops_are_written_in_percent_for_shares_only():
    assert drop_in_words(0.0123, "top5") == "1.23%"
    assert drop_in_words(0.0123, "perplexity") == "0.0123"
