"""The factor in the memory of the second moments, against inverses that are written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.arrays.rounding.inverse_factor import STRIP, factorized, factorized_in_place
from penjing.arrays.sparsity.gram import damped, output_error
from penjing.core.errors import Refused


def moments(columns, seed, rows=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows or 4 * columns, columns)) * rng.uniform(0.2, 3, columns)
    return x.T @ x


@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("columns", [1, 7, STRIP + 3, 2 * STRIP])
def test_the_factor_is_that_of_the_inverse_and_lies_where_the_moments_were(columns, order):
    gram = moments(columns, columns)
    wanted = factorized(damped(gram, 0.05), order)
    mine = gram.copy()
    found = factorized_in_place(mine, order, 0.05)
    assert np.shares_memory(found.upper, mine)
    np.testing.assert_array_equal(found.taken, wanted.taken)
    np.testing.assert_allclose(np.triu(found.upper), wanted.upper, atol=1e-9 * np.abs(wanted.upper).max())
    np.testing.assert_allclose(found.price, np.diagonal(damped(gram, 0.05)))


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 40), rows=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_costs_and_solutions_are_those_of_the_moments(columns, rows, seed):
    gram = moments(columns, seed, rows=max(columns // 2, 1))
    change = np.random.default_rng(seed).normal(size=(rows, columns))
    found = factorized_in_place(gram.copy(), "activation", 0.1)
    size = output_error(change, damped(gram, 0.1))
    assert found.cost(change) == pytest.approx(output_error(change, gram), rel=1e-7, abs=1e-9 * size)
    solved = np.linalg.solve(damped(gram, 0.1), change.T).T
    np.testing.assert_allclose(found.solved(change), solved, atol=1e-8 * np.abs(solved).max())


def test_inputs_that_are_all_zero_have_a_price():
    found = factorized_in_place(np.zeros((3, 3)), "given", 0.01)
    np.testing.assert_array_equal(np.triu(found.upper), np.eye(3))
    assert found.cost(np.ones((2, 3))) == 0


def test_moments_that_are_none_are_refused():
    with pytest.raises(Refused, match="positive definite"):
        factorized_in_place(np.array([[1.0, 4], [4, 1]]), "given", 0.01)
