"""What a budget is said to mean before the search starts."""

import pytest

from penjing.core.budget import Budget
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured
from penjing.measurement.certifiable import Certifiable
from penjing.planners.forecast import EPOCHS, TRAINED_TRIALS, WITHOUT_TIME, Timing, forecast

ENOUGH = Certifiable(0.001, None)
NO_TIME = "no time"


def measured(ms=4.0, size=1_000_000, memory=None):
    def estimate(value):
        return Estimate(value=value, low=value, high=value, n=1)

    latency = Latency(
        p50_ms=estimate(ms),
        p95_ms=estimate(ms),
        p99_ms=estimate(ms),
        throughput_per_s=estimate(1),
        batch=1,
        threads=1,
        calls=1,
        rounds=1,
    )
    nothing = NotMeasured(reason="synthetic")
    return Measurement(
        name="",
        target="",
        split="valid",
        metric="accuracy",
        quality=nothing,
        latency=latency,
        memory_bytes=nothing if memory is None else estimate(memory),
        size_bytes=size,
    )


def timing(survey=1.0, measurement=0.5, epoch=10.0, spent=5.0):
    return Timing(survey=survey, measurement=measurement, epoch=epoch, spent=spent)


def test_limits_are_said_in_absolute_numbers():
    told = forecast(Budget(latency="60%", size="250kB"), measured(), timing(), ENOUGH, NO_TIME)
    latency, size = told.lines
    assert (latency.name, latency.limit, latency.baseline, latency.unit) == (
        "latency",
        pytest.approx(2.4),
        4.0,
        "ms",
    )
    assert (
        latency.words == "2.4 ms, 60% of the baseline's 4 ms (not probed whether it can be reached: no time)"
    )
    assert size.words.startswith("250 kB, 25% of the baseline's 1 MB")
    assert not told.met
    assert told.warnings == ()


def test_the_smallest_model_probed_says_whether_a_limit_looks_reachable():
    budget = Budget(latency="1ms", size="10kB")
    latency, size = forecast(budget, measured(), timing(), ENOUGH, floor=measured(ms=0.8, size=50_000)).lines
    assert latency.words.endswith("(looks reachable: the smallest model probed has 0.8 ms)")
    assert size.words.endswith("(looks out of reach: the smallest model probed has 50 kB)")


def test_limits_that_the_baseline_keeps_are_met():
    told = forecast(Budget(latency="5ms", size="100%"), measured(), timing(), ENOUGH, NO_TIME)
    assert told.met
    assert all(line.met and "kept already" in line.words for line in told.lines)
    assert not forecast(Budget(latency="5ms", size="50%"), measured(), timing(), ENOUGH, NO_TIME).met
    assert not forecast(Budget(max_drop="1%"), measured(), timing(), ENOUGH, NO_TIME).met
    assert not forecast(Budget(), measured(), timing(), ENOUGH, NO_TIME).met


def test_what_was_not_measured_is_said_and_never_met():
    relative, absolute = (
        forecast(Budget(memory=limit), measured(), timing(), ENOUGH, NO_TIME).lines[0]
        for limit in ("50%", "1GB")
    )
    assert "was not measured" in relative.words
    assert not relative.met
    assert relative.baseline is None
    assert absolute.limit == 1e9
    assert not absolute.met
    floor = measured(ms=1.0)
    assert forecast(Budget(memory="1GB"), measured(memory=2e9), timing(), ENOUGH, floor).lines[0].words == (
        "1 GB, 50% of the baseline's 2 GB"
    )


def test_time_is_divided_among_trials_with_recovery():
    told = forecast(Budget(time="10min"), measured(), timing(), ENOUGH, NO_TIME)
    assert told.epochs in EPOCHS
    assert told.cheap_seconds == 1.5
    assert told.trial_seconds == 1.5 + 10 * told.epochs
    assert TRAINED_TRIALS * told.trial_seconds + told.reserve_seconds + 5 <= 600
    longer = next(e for e in EPOCHS if e > told.epochs)
    assert TRAINED_TRIALS * (1.5 + 10 * longer) + told.reserve_seconds + 5 + 1.5 > 600
    assert forecast(Budget(), measured(), timing(), ENOUGH, NO_TIME).epochs == WITHOUT_TIME
    assert forecast(Budget(time="10h"), measured(), timing(), ENOUGH, NO_TIME).epochs == EPOCHS[-1]


def test_models_that_cannot_train_have_cheap_trials():
    told = forecast(Budget(time="10min"), measured(), timing(epoch=None), ENOUGH, NO_TIME)
    assert told.trial_seconds == told.cheap_seconds


def test_too_little_time_is_said_before_it_is_lost():
    told = forecast(Budget(time="6s"), measured(), timing(), ENOUGH, NO_TIME)
    assert told.epochs == EPOCHS[0]
    assert "hardly enough" in told.warnings[0]
    assert "9.75 s" in told.warnings[0]


def test_a_drop_that_the_examples_cannot_certify_is_said_with_the_number_that_would_do():
    told = forecast(Budget(max_drop="0.5%"), measured(), timing(), Certifiable(0.0149, 598), NO_TIME)
    assert told.warnings == (
        "0.5 points cannot be certified with these test examples even if no prediction changes "
        "(smallest: 1.5 points); 598 examples would do",
    )
    assert (
        forecast(Budget(latency="50%"), measured(), timing(), Certifiable(0.0149, 598), NO_TIME).warnings
        == ()
    )
