import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.arrays.smoothing import STRENGTHS, smoothing, smoothing_factors


def spread_rows(rng, rows=256, channels=32, outliers=2):
    """Return activations of which a few channels are fifty times as large as the others."""
    x = rng.standard_normal((rows, channels)).astype(np.float32)
    x[:, :outliers] *= 50
    return x


def plain_error(x, weights, factors):
    """Squared error of products in 8 bits over their squares, written out."""
    off = whole = 0.0
    narrow = x / factors
    low, high = min(narrow.min(), 0), max(narrow.max(), 0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    narrow = (np.clip(np.rint(narrow / step) + zero, 0, 255) - zero) * step
    for w in weights:
        scaled = w * factors
        steps = np.abs(scaled).max(axis=1, keepdims=True) / 127
        rounded = np.rint(scaled / steps) * steps
        off += np.square(narrow @ rounded.T - x @ w.T).sum()
        whole += np.square(x @ w.T).sum()
    return off / whole


def test_the_chosen_strength_errs_least_of_all():
    rng = np.random.default_rng(0)
    x = spread_rows(rng)
    weights = [rng.standard_normal((16, 32)).astype(np.float32) for _ in range(2)]
    found = smoothing(x, np.abs(x).max(axis=0), weights)
    errors = {
        s: plain_error(x, weights, smoothing_factors(np.abs(x).max(axis=0), weights, s)) for s in STRENGTHS
    }
    assert found.strength == min(errors, key=lambda s: errors[s])
    assert found.after == pytest.approx(errors[found.strength], rel=1e-2)
    assert found.before == pytest.approx(plain_error(x, weights, np.ones(32, np.float32)), rel=1e-2)
    assert found.after < found.before / 5
    assert found.factors[:2].min() > 5 * found.factors[2:].max()


def test_even_activations_are_left_alone():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.9, 1, (256, 32)).astype(np.float32)
    weights = [np.sign(rng.standard_normal((16, 32))).astype(np.float32)]
    found = smoothing(x, np.abs(x).max(axis=0), weights)
    assert found.strength == 0
    assert (found.factors == 1).all()
    assert found.before == found.after


@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_factors_have_mean_one_and_channels_of_zeros_none(strength, seed):
    rng = np.random.default_rng(seed)
    largest = np.abs(rng.standard_normal(12)).astype(np.float32) * 10
    weight = rng.standard_normal((5, 12)).astype(np.float32)
    largest[0] = 0
    weight[:, 1] = 0
    factors = smoothing_factors(largest, [weight], strength)
    assert (factors > 0).all()
    assert (factors[:2] == 1).all()
    assert np.log(factors[2:]).mean() == pytest.approx(0, abs=1e-5)
    if strength == 1:
        np.testing.assert_allclose(factors[2:] / factors[2], largest[2:] / largest[2], rtol=1e-4)


def test_all_zeros_change_nothing():
    assert (smoothing_factors(np.zeros(4, np.float32), [np.ones((2, 4), np.float32)], 0.5) == 1).all()
