"""Sums over the data give the fit that the data themselves give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.arrays.least_squares import (
    CHUNK_ROWS,
    RIDGES,
    NormalEquations,
    best_bias,
    cross_checked,
    refit,
    relative_error,
)
from penjing.arrays.moments import match

TINY = 1e-12


def problem(n=200, blocks=1, inputs=6, outputs=3, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(blocks * inputs, blocks * inputs))
    x = rng.normal(size=(n, blocks * inputs)) @ mixing + rng.normal(size=blocks * inputs)
    y = rng.normal(size=(n, blocks * outputs)) + rng.normal(size=blocks * outputs)
    sums = NormalEquations(blocks, inputs, outputs)
    sums.add(x, y)
    weight, bias = rng.normal(size=(blocks * outputs, inputs)), rng.normal(size=blocks * outputs)
    return x, y, sums, weight, bias


def predicted(x, weight, bias, blocks=1):
    parts = zip(np.split(x, blocks, axis=1), np.split(weight, blocks), strict=True)
    return np.concatenate([part @ w.T for part, w in parts], axis=1) + bias


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_residual_of_the_fit_is_orthogonal_to_the_inputs_and_has_mean_zero(blocks):
    x, y, sums, weight, bias = problem(blocks=blocks)
    new, shift = refit(sums, weight, bias, TINY)
    residual = y - predicted(x, new, shift, blocks)
    assert abs(residual.mean(0)).max() < 1e-9
    for number in range(blocks):
        mine, out = slice(6 * number, 6 * number + 6), slice(3 * number, 3 * number + 3)
        assert abs(x[:, mine].T @ residual[:, out]).max() < 1e-5


def test_without_a_bias_the_fit_is_that_of_numpy():
    x, y, sums, weight, _ = problem()
    new, shift = refit(sums, weight, None, TINY)
    assert shift is None
    np.testing.assert_allclose(new.T, np.linalg.lstsq(x, y, rcond=None)[0], rtol=1e-6)


def test_with_a_support_each_row_is_fitted_on_its_own_columns():
    x, y, sums, weight, bias = problem()
    support = np.random.default_rng(1).random(weight.shape) < 0.5
    support[1] = support[0]
    support[2] = False
    new, shift = refit(sums, weight, bias, TINY, support)
    assert (new[~support] == 0).all()
    for row in range(3):
        design = np.concatenate([x[:, support[row]], np.ones((len(x), 1))], axis=1)
        exact = np.linalg.lstsq(design, y[:, row], rcond=None)[0]
        np.testing.assert_allclose([*new[row, support[row]], shift[row]], exact, rtol=1e-5)


def test_what_the_data_do_not_say_stays_as_it_was():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, 4))
    x[:, 3] = 0
    sums = NormalEquations(1, 4, 2)
    sums.add(x, x[:, :2])
    weight = rng.normal(size=(2, 4))
    new, _ = refit(sums, weight, np.zeros(2), 1e-9)
    np.testing.assert_allclose(new[:, 3], weight[:, 3])
    np.testing.assert_allclose(new[:, :3], np.eye(3)[:2], atol=1e-6)
    kept, _ = refit(sums, weight, np.zeros(2), 1e9)
    np.testing.assert_allclose(kept, weight, atol=1e-6)


def test_inputs_that_are_all_zero_leave_the_weights():
    sums = NormalEquations(1, 3, 2)
    sums.add(np.zeros((10, 3)), np.ones((10, 2)))
    weight = np.arange(6.0).reshape(2, 3)
    new, shift = refit(sums, weight, np.zeros(2), 1e-3)
    np.testing.assert_array_equal(new, weight)
    np.testing.assert_allclose(shift, 1)


@given(st.integers(0, 10_000), st.integers(1, 3), st.booleans())
def test_the_error_from_sums_is_the_error_on_the_data(seed, blocks, biased):
    x, y, sums, weight, bias = problem(60, blocks, 4, 2, seed)
    wrong = y - predicted(x, weight, bias if biased else 0, blocks)
    expected = np.square(wrong).sum() / np.square(y - y.mean(0)).sum()
    assert relative_error(sums, weight, bias if biased else None) == pytest.approx(expected, rel=1e-8)


def test_sums_in_parts_are_the_sums_of_the_whole():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(CHUNK_ROWS + 7, 5)), rng.normal(size=(CHUNK_ROWS + 7, 2))
    whole, first, second = (NormalEquations(1, 5, 2) for _ in range(3))
    whole.add(x, y)
    first.add(x[:100].astype(np.float32), y[:100].astype(np.float32))
    second.add(x[100:], y[100:])
    both = first + second
    assert both.count == whole.count == len(x)
    np.testing.assert_allclose(both.xx, whole.xx, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(both.xy, whole.xy, rtol=1e-5, atol=1e-3)


def test_the_best_bias_takes_the_mean_residual_away():
    x, y, sums, weight, _ = problem(blocks=2)
    shift = best_bias(sums, weight)
    np.testing.assert_allclose((y - predicted(x, weight, shift, 2)).mean(0), 0, atol=1e-9)


def halves(n, inputs, noise, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(1, inputs))
    sums = []
    for count in (n, 2000):
        x = rng.normal(size=(count, inputs))
        part = NormalEquations(1, inputs, 1)
        part.add(x, x @ truth.T + noise * rng.normal(size=(count, 1)))
        sums.append(part)
    return truth, sums


def test_the_ridge_follows_the_noise():
    truth, sums = halves(n=400, inputs=20, noise=0.0)
    clean = cross_checked(*sums, np.zeros((1, 20)), np.zeros(1))
    assert clean.ridge == RIDGES[0]
    assert clean.helps
    assert clean.after < 1e-6 < clean.before
    truth, sums = halves(n=24, inputs=20, noise=3.0)
    noisy = cross_checked(*sums, 0.9 * truth, np.zeros(1))
    assert noisy.ridge >= 0.1


def test_a_fit_that_errs_more_on_what_it_did_not_see_is_not_taken():
    truth, sums = halves(n=22, inputs=20, noise=5.0)
    fit = cross_checked(*sums, truth, np.zeros(1), ridges=(1e-5,))
    assert not fit.helps
    np.testing.assert_array_equal(fit.weight, truth)


def test_statistics_match_exactly_without_shrinkage_and_dead_channels_are_not_blown_up():
    rng = np.random.default_rng(4)
    now, wanted = rng.normal(size=(500, 3)), rng.normal(2, [1.0, 2.0, 3.0], size=(500, 3))
    moments = [(part.mean(0), part.var(0)) for part in (now, wanted)]
    scale, shift = match(*moments, shrinkage=0.0)
    after = now * scale + shift
    np.testing.assert_allclose(after.mean(0), wanted.mean(0))
    np.testing.assert_allclose(after.var(0), wanted.var(0))
    dead = now * [1, 1e-9, 1]
    scale, _ = match((dead.mean(0), dead.var(0)), moments[1], shrinkage=0.01)
    assert scale[1] < 12
    scale, shift = match((np.zeros(1), np.zeros(1)), (np.ones(1), np.ones(1)), shrinkage=0.0)
    assert (scale.tolist(), shift.tolist()) == ([1.0], [1.0])
