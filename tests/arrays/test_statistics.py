"""The statistics hold what they state: against brute force, published values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from penjing.arrays.statistics import (
    drop_bounds,
    holm,
    median_interval,
    needed_examples,
    noninferiority_p_value,
    paired_ratio_interval,
    smallest_certifiable_drop,
    superiority_p_value,
    tango_interval,
    tango_statistic,
    wilson,
)
from penjing.core.errors import Refused


def most_losses(n: int, gained: int, drop: float, alpha: float) -> int:
    """The most losses that still certify, given the gains; the test is monotone in the losses."""
    low, high = -1, n - gained + 1
    while high - low > 1:
        middle = (low + high) // 2
        certified = noninferiority_p_value(middle, gained, n, drop, alpha) <= alpha
        low, high = (middle, high) if certified else (low, middle)
    return low


def test_tango_reproduces_the_published_interval():
    # Airway hyper-responsiveness (Bentur et al., 2009), in Fagerland, Lydersen and Laake (2014).
    interval = tango_interval(1, 7, 21)
    assert interval.value == pytest.approx(-6 / 21)
    assert interval.low == pytest.approx(-0.517, abs=5e-4)
    assert interval.high == pytest.approx(-0.026, abs=5e-4)


@pytest.mark.parametrize("case", [(5, 3, 40, 0.1), (0, 4, 30, 0.05), (7, 0, 50, -0.02), (2, 2, 25, -0.3)])
def test_tango_variance_is_the_constrained_maximum_likelihood(case: tuple[int, int, int, float]):
    b, c, n, drop = case
    q = np.linspace(max(0, -drop) + 1e-9, (1 - drop) / 2 - 1e-9, 400_001)
    likelihood = b * np.log(q + drop) + c * np.log(q) + (n - b - c) * np.log(1 - 2 * q - drop)
    best = q[likelihood.argmax()]
    expected = (b - c - n * drop) / math.sqrt(n * (2 * best + drop - drop**2))
    assert float(tango_statistic(b, c, n, drop)) == pytest.approx(expected, abs=2e-4)


def test_tango_without_any_variance_has_a_sign():
    assert float(tango_statistic(0, 0, 10, 0.0)) == 0.0
    assert float(tango_statistic(3, 0, 3, 1.0)) == 0.0
    assert float(tango_statistic(0, 0, 10, 1.0)) == -np.inf


def test_exact_p_value_agrees_with_enumeration_of_all_outcomes():
    n, drop, lost, gained = 25, 0.2, 2, 1
    observed = float(tango_statistic(lost, gained, n, drop))
    b, c = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    inside = (b + c <= n) & (tango_statistic(b, c, n, drop) <= observed + 1e-9)
    interval = binomtest(gained, n).proportion_ci(1 - 0.001, method="exact")
    worst = 0.0
    for q in np.linspace(interval.low, min(interval.high, (1 - drop) / 2), 800):
        mass = binom.pmf(c, n, q) * binom.pmf(b, np.maximum(n - c, 0), (q + drop) / (1 - q))
        worst = max(worst, float(mass[inside].sum()))
    assert noninferiority_p_value(lost, gained, n, drop) == pytest.approx(worst + 0.001, abs=2e-4)


def test_no_change_at_all_gives_the_rule_of_three():
    # 0 of n bounds a share by 1 - alpha^(1/n), about 3/n.
    for n in (100, 360, 10_000):
        assert drop_bounds(0, 0, n).high == pytest.approx(1 - 0.05 ** (1 / n), rel=0.02)
        assert drop_bounds(0, 0, n).high >= 1 - 0.05 ** (1 / n)


def test_bounds_are_antisymmetric_and_agree_with_the_p_value():
    bounds, mirrored = drop_bounds(12, 5, 800, 0.9), drop_bounds(5, 12, 800, 0.9)
    assert bounds.low == -mirrored.high
    assert bounds.high == -mirrored.low
    assert bounds.low < bounds.value == 7 / 800 < bounds.high
    assert noninferiority_p_value(12, 5, 800, bounds.high + 1e-5, 0.1) <= 0.1
    assert noninferiority_p_value(12, 5, 800, bounds.high - 1e-5, 0.1) > 0.1


def test_exact_and_asymptotic_bounds_agree_with_many_changes():
    exact, asymptotic = drop_bounds(600, 500, 20_000), tango_interval(600, 500, 20_000, 0.9)
    assert exact.high == pytest.approx(asymptotic.high, rel=0.02)
    assert exact.high >= asymptotic.high - 1e-5


@pytest.mark.parametrize("n", [100, 500, 2000])
@pytest.mark.parametrize("flips", [0.0, 0.01, 0.04])
def test_false_acceptances_at_the_boundary_stay_below_alpha(n: int, flips: float):
    alpha, cases = 0.05, 10_000
    slack = 3 * math.sqrt(alpha * (1 - alpha) / cases)
    rng = np.random.default_rng([n, int(flips * 1000)])
    for drop in (0.01, 0.0272):
        lost_rate, gained_rate = drop + flips / 2, flips / 2
        counts = rng.multinomial(n, [lost_rate, gained_rate, 1 - lost_rate - gained_rate], cases)
        limit = {c: most_losses(n, int(c), drop, alpha) for c in np.unique(counts[:, 1])}
        accepted = counts[:, 0] <= np.array([limit[c] for c in counts[:, 1]])
        assert accepted.mean() <= alpha + slack


def test_false_acceptances_computed_exactly_stay_below_alpha_where_tango_fails():
    n, drop, alpha = 100, 0.0272, 0.05
    gained = np.arange(0, 15)
    exact = np.array([most_losses(n, int(c), drop, alpha) for c in gained])
    score = np.array(
        [max([-1, *np.flatnonzero(tango_statistic(np.arange(40), c, n, drop) <= -1.645)]) for c in gained]
    )

    def size(limit: np.ndarray, q: float) -> float:
        below = np.where(limit < 0, 0, binom.cdf(limit, n - gained, (q + drop) / (1 - q)))
        return float((binom.pmf(gained, n, q) * below).sum())

    assert size(score, 0.0) > 0.06
    assert max(size(exact, q) for q in np.linspace(0, 0.05, 41)) <= alpha


def test_the_fixed_sequence_keeps_the_family_wise_error():
    # Five candidates that share their errors in part; the third is exactly at the margin, the rest worse.
    n, drop, alpha, cases = 400, 0.02, 0.05, 10_000
    rng = np.random.default_rng(5)
    extra = np.array([-0.012, -0.005, 0.0, 0.0, 0.01])
    common = rng.binomial(n, 0.01, cases)
    going, wrong = np.ones(cases, bool), np.zeros(cases, bool)
    cache: dict[int, int] = {}
    for k, more in enumerate(extra):
        lost = common + rng.binomial(n - common, (drop + more) / (1 - 0.01))
        gained = rng.binomial(n - lost, 0.01 / (1 - 0.01 - drop - more))
        for c in np.unique(gained):
            cache.setdefault(int(c), most_losses(n, int(c), drop, alpha))
        going &= lost <= np.array([cache[int(c)] for c in gained])
        if k >= 2:
            wrong |= going
    assert 0 < wrong.mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / cases)


@pytest.mark.parametrize(
    ("max_drop", "flips", "drop"), [(0.01, 0.02, 0.0), (0.005, 0.0, 0.0), (0.02, 0.05, 0.005)]
)
def test_the_number_of_examples_asked_for_has_the_stated_power(max_drop: float, flips: float, drop: float):
    n = needed_examples(max_drop, flips, drop=drop)
    rng = np.random.default_rng(3)
    lost, gained = (flips + drop) / 2, (flips - drop) / 2
    counts = rng.multinomial(n, [lost, gained, 1 - lost - gained], 400)
    limit = {c: most_losses(n, int(c), max_drop, 0.05) for c in np.unique(counts[:, 1])}
    power = np.mean([b <= limit[c] for b, c, _ in counts])
    assert power >= 0.74
    if flips:
        assert power <= 0.9


def test_the_smallest_drop_inverts_the_number_of_examples():
    # 1% of 872, 7,600, 10,000 and 50,000 examples flip; one-sided 5%, power 80%.
    assert [round(100 * smallest_certifiable_drop(n, 0.01), 2) for n in (7600, 10_000, 50_000)] == [
        0.29,
        0.25,
        0.11,
    ]
    drop = smallest_certifiable_drop(872, 0.05)
    assert needed_examples(drop, 0.05) <= 872 < needed_examples(drop * 0.99, 0.05)
    with pytest.raises(Refused, match="must be below max_drop"):
        needed_examples(0.01, 0.02, drop=0.01)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (20, 20), (7, 50), (930, 1000)])
def test_wilson_agrees_with_scipy(successes: int, n: int):
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((successes / n, expected.low, expected.high), abs=1e-12)


def test_mcnemar_agrees_with_the_binomial_test():
    assert superiority_p_value(9, 2) == pytest.approx(binomtest(9, 11, alternative="greater").pvalue)
    assert superiority_p_value(0, 0) == superiority_p_value(0, 4) == 1.0


def test_holm_matches_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).tolist() == []


def test_median_interval_covers_as_stated():
    rng = np.random.default_rng(0)
    for n in (4, 7, 15, 30):
        samples = rng.lognormal(0, 0.2, (2000, n))
        hits = [low <= 1.0 <= high for _, low, high in map(median_interval, samples)]
        assert np.mean(hits) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_paired_ratio_does_not_see_drift_and_sees_a_factor():
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 3, 15)
    reference = drift * rng.lognormal(0, 0.02, 15)
    same = paired_ratio_interval(drift * rng.lognormal(0, 0.02, 15), reference)
    twice = paired_ratio_interval(2 * drift * rng.lognormal(0, 0.02, 15), reference)
    assert same.low <= 1 <= same.high
    assert twice.low > 1.9
    assert twice.high < 2.1


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(1, 0),
        lambda: wilson(5, 4),
        lambda: drop_bounds(3, 3, 5),
        lambda: drop_bounds(0, 0, 0),
        lambda: median_interval([1.0]),
        lambda: median_interval([1.0, math.nan, 2.0]),
        lambda: paired_ratio_interval([1, 2], [1, 0]),
        lambda: smallest_certifiable_drop(0, 0.1),
    ],
)
def test_senseless_counts_are_refused(call):
    with pytest.raises(Refused):
        call()
