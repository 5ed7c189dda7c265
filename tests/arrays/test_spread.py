"""What several runs say together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.arrays.spread import difference_interval, disagreement, mean_interval, sampling_spread
from penjing.core.errors import Refused


def test_students_interval():
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / np.sqrt(3)
    np.testing.assert_allclose(found, (2, 2 - half, 2 + half))
    with pytest.raises(Refused, match="two runs"):
        mean_interval([1.0])


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [f.low <= 0 <= f.high for f in (mean_interval(rng.standard_normal(5)) for _ in range(2000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired():
    assert difference_interval([1.0, 5.0], [2.0, 6.0]) == (1, 1, 1)
    with pytest.raises(Refused, match="same seeds"):
        difference_interval([1.0], [1.0, 2.0])


def test_disagreement_is_a_mean_over_pairs():
    runs = [np.array(run) for run in ([0, 1, 2, 3], [0, 1, 2, 0], [1, 1, 2, 3])]
    assert disagreement(runs) == pytest.approx((1 + 1 + 2) / 12)


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_spread_over_sampling_is_cochrans_q(runs, n, seed):
    right = np.random.default_rng(seed).random((runs, n)) < 0.7
    found = sampling_spread(list(right))
    each, of_example = right.sum(1), right.sum(0)
    divisor = runs * of_example.sum() - (of_example**2).sum()
    if divisor == 0:
        assert found == 0
        return
    q = runs * (runs - 1) * ((each - each.mean()) ** 2).sum() / divisor
    assert np.var(right.mean(1), ddof=1) / found**2 == pytest.approx(q / (runs - 1))


def test_equally_good_runs_spread_as_much_as_expected():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(400):
        chances = rng.beta(4, 0.5, 500)
        right = rng.random((5, 500)) < chances
        ratios.append(np.std(right.mean(1), ddof=1) / sampling_spread(list(right)))
    assert np.mean(np.square(ratios)) == pytest.approx(1, abs=0.1)
    assert max(ratios) < 2.5
