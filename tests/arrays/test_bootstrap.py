"""The paired bootstrap: agrees with scipy's BCa, refuses what it cannot know, and repeats by its seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from penjing.arrays.bootstrap import bootstrap
from penjing.core.errors import Refused


def mean_of(values: np.ndarray):
    return lambda weights: weights @ values / weights.sum(axis=1)


def test_bounds_of_a_mean_agree_with_scipy():
    values = np.random.default_rng(0).exponential(size=150)
    found = bootstrap(mean_of(values), len(values), replicates=8000)
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="BCa", n_resamples=8000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert found.quantile(0.05) == pytest.approx(interval.low, abs=0.015)
    assert found.quantile(0.95) == pytest.approx(interval.high, abs=0.015)
    assert found.deviation == pytest.approx(values.std() / np.sqrt(150), rel=0.05)


def test_same_seed_same_bounds_and_a_constant_has_no_spread():
    values = np.random.default_rng(0).normal(size=40)
    first, second = (bootstrap(mean_of(values), 40, seed=3) for _ in range(2))
    assert np.array_equal(first.replicates, second.replicates)
    assert bootstrap(mean_of(np.full(10, 2.0)), 10).quantile(0.99) == pytest.approx(2.0)


def test_a_statistic_undefined_on_many_resamples_is_refused():
    def of_a_rare_example(weights: np.ndarray) -> np.ndarray:
        return np.where(weights[:, 0] > 0, 1.0, np.nan)

    with pytest.raises(Refused, match="defined on resamples"):
        bootstrap(of_a_rare_example, 30)
    with pytest.raises(Refused, match="at least 2 examples"):
        bootstrap(mean_of(np.ones(1)), 1)
