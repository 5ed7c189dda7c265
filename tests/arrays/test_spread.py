"""Means and differences over runs, against known intervals."""

import numpy as np
import pytest

from penjing.arrays.spread import difference_interval, disagreement, mean_interval
from penjing.core.errors import Refused


def test_students_interval_of_known_values():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    # t(0.975, 4) = 2.776445, standard error = sqrt(2.5 / 5)
    assert found.high - 3 == pytest.approx(2.776445 * np.sqrt(0.5), rel=1e-6)
    assert 3 - found.low == pytest.approx(found.high - 3)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [f.low <= 0 <= f.high for f in (mean_interval(rng.standard_normal(5)) for _ in range(2000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired():
    first = [0.5, 0.6, 0.7, 0.8]
    found = difference_interval(first, [x + 0.01 for x in first])
    assert found.value == pytest.approx(0.01)
    assert found.high - found.low < 1e-9
    with pytest.raises(Refused, match="same seeds"):
        difference_interval(first, first[:2])
    with pytest.raises(Refused, match="at least two runs"):
        difference_interval([1.0], [2.0])


def test_disagreement_is_a_mean_over_pairs():
    runs = [np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0]), np.array([1, 1, 2, 3])]
    assert disagreement(runs) == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert disagreement(runs[:1]) == 0
