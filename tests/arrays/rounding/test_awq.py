"""AWQ's search against every exponent by itself."""

import numpy as np
import pytest

from penjing.arrays.formats.coding import rounded
from penjing.arrays.rounding.awq import ALPHAS, SHRINKS, awq, importance_clipped
from penjing.arrays.sparsity.gram import output_error
from penjing.core.number_format import number_format


def problem(seed, columns=32):
    """A weight, and inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, columns)) * np.exp(rng.normal(size=columns) * 1.5)
    return rng.normal(size=(12, columns)), x


@pytest.mark.parametrize("name", ["int3 channel", "uint2 group 8", "nf4 group 16", "mxfp4"])
def test_the_best_exponent_is_found(name):
    form = number_format(name)
    weight, x = problem(0)
    gram = x.T @ x / len(x)
    factors, alpha = awq(weight, gram, form)
    errors = {}
    for power in ALPHAS:
        own = np.sqrt(np.mean(x**2, axis=0)) ** power
        own /= np.sqrt(own.max() * own.min())
        parameters = importance_clipped(weight * own, np.mean((x / own) ** 2, axis=0), form, SHRINKS)
        y = (x / own) @ rounded(weight * own, form, *parameters).T
        errors[power] = np.square(y - x @ weight.T).sum(axis=1).mean()
    assert errors[alpha] <= min(errors.values()) * (1 + 1e-9)
    assert errors[alpha] < 0.9 * errors[0.0]
    assert factors.max() * factors.min() == pytest.approx(1)


def test_inputs_that_are_always_zero_do_no_harm():
    form = number_format("int4 channel")
    weight, x = problem(1)
    x[:, 3] = 0
    factors, _ = awq(weight, x.T @ x / len(x), form)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    factors, alpha = awq(weight, np.zeros((32, 32)), form)
    assert alpha == 0
    assert (factors == 1).all()


def test_weights_of_large_inputs_err_less():
    form = number_format("int3 channel")
    weight, x = problem(2)
    gram = x.T @ x / len(x)
    plain = rounded(weight, form, *importance_clipped(weight, np.diagonal(gram), form)) - weight
    factors, _ = awq(weight, gram, form)
    scaled = importance_clipped(weight * factors, np.diagonal(gram) / factors**2, form)
    change = rounded(weight * factors, form, *scaled) / factors - weight
    assert output_error(change, gram) < output_error(plain, gram)
