"""What a test split can certify at the best, said before the search."""

import numpy as np
import pytest

import penjing as pj
from penjing.core.budget import Budget
from penjing.core.task import Split, Task
from penjing.measurement.certifiable import certifiable
from penjing.measurement.certify import certify


def task(n: int, groups: int | None = None, **fields) -> Task:
    targets = np.arange(n) % 4
    names = None if groups is None else np.arange(n) % groups
    test = Split((np.arange(n, dtype=np.float32)[:, None],), targets, "test", names)
    return Task(train=None, test=test, prepared=True, **fields)


def share_right(outputs, targets):
    return float((outputs.argmax(axis=1) == targets).mean())


SHARE = {"metric": share_right, "direction": "maximize"}


@pytest.mark.parametrize(
    ("made", "fields"),
    [
        (task(500), {}),
        (task(500, metric="top2"), {}),
        (task(500, groups=50), {}),
        (task(500, **SHARE, metric_range=(0, 1)), {}),
        (task(500, groups=100, **SHARE, metric_range=(0, 2)), {}),
    ],
    ids=["accuracy", "top 2", "groups", "own metric", "own metric in groups"],
)
def test_it_is_the_bound_of_a_candidate_that_changes_nothing(made, fields):
    outputs = np.eye(4, dtype=np.float32)[made.test.targets]
    best = certifiable(made, 0.5, 0.95)
    drop = certify(outputs, [("same", outputs)], made.test.targets, made, None, 0.95, made.test.groups)[
        0
    ].drop
    assert best.smallest == pytest.approx(drop.high, rel=0.02)
    assert best.needed is None
    few = certifiable(made, best.smallest / 4, 0.95)
    assert few.needed == pytest.approx(4 * 500, rel=0.05)


def test_a_metric_without_a_range_is_said_to_have_no_bound():
    found = certifiable(task(10_000, **SHARE), 0.1, 0.95)
    assert "set Task(metric_range=" in found.no_bound
    assert certifiable(task(10, **SHARE), None, 0.95).no_bound == ""


def test_the_forecast_warns_of_it():
    from penjing.core.measurement import Measurement, NotMeasured
    from penjing.planners.forecast import Timing, forecast

    gone = NotMeasured(reason="not here")
    measured = Measurement(
        name="float",
        target="onnxruntime",
        split="valid",
        metric="share_right",
        quality=gone,
        latency=gone,
        memory_bytes=gone,
        size_bytes=1,
    )
    timing = Timing(survey=1, measurement=1, epoch=None, spent=2)
    found = certifiable(task(10_000, **SHARE), 0.1, 0.95)
    told = forecast(Budget(max_drop="10%", size="50%"), measured, timing, found, "no time")
    assert any("inconclusive, no bound on the metric" in warning for warning in told.warnings)
    enough = certifiable(task(10_000, **SHARE, metric_range=(0, 1)), 0.1, 0.95)
    assert forecast(pj.Budget(max_drop="10%"), measured, timing, enough, "no time").warnings == ()
