"""The knapsack of options against every choice there is, and against HiGHS."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

import penjing as pj
from penjing.arrays.knapsack import choose_options


def total(values, chosen):
    return sum(part[i] for part, i in zip(values, chosen, strict=True))


@st.composite
def problems(draw):
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    whole = st.integers(-5, 20)
    costs = [np.array(draw(st.lists(whole, min_size=n, max_size=n)), np.float64) for n in widths]
    weights = [np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))) for n in widths]
    least, most = (sum(int(end(w)) for w in weights) for end in (np.min, np.max))
    return costs, weights, draw(st.integers(least, most))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_it_is_as_good_as_the_best_of_all_choices(problem):
    costs, weights, budget = problem
    chosen = choose_options(costs, weights, budget)
    assert total(weights, chosen) <= budget
    every = itertools.product(*(range(len(part)) for part in costs))
    best = min(total(costs, choice) for choice in every if total(weights, choice) <= budget)
    assert total(costs, chosen) == pytest.approx(best, abs=1e-9)


def by_highs(costs, weights, budget):
    owner = np.repeat(np.arange(len(costs)), [len(part) for part in costs])
    one_each = (owner == np.arange(len(costs))[:, None]).astype(float)
    rules = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.concatenate(weights)[None], -np.inf, budget),
    ]
    more = {"integrality": np.ones(len(owner)), "options": {"mip_rel_gap": 0}}
    found = milp(np.concatenate(costs), constraints=rules, bounds=Bounds(0, 1), **more)
    assert found.success
    return found.fun


@pytest.mark.parametrize("layers", [20, 200])
def test_it_is_as_good_as_highs_on_the_sizes_of_networks(layers):
    """Bits of layers of up to millions of weights, costs that fall about fourfold with each bit."""
    rng = np.random.default_rng(layers)
    sizes = 64 * rng.integers(1, 40_000, layers)
    bits = np.array([2, 3, 4, 5, 6, 8])
    noise = np.exp(rng.normal(size=(layers, len(bits))) / 3)
    costs = list(rng.lognormal(0, 2, (layers, 1)) * 4.0**-bits * noise)
    weights = [int(size) * bits for size in sizes]
    for mean in (2.5, 4.0):
        budget = int(mean * sizes.sum())
        chosen = choose_options(costs, weights, budget)
        assert total(weights, chosen) <= budget
        assert total(costs, chosen) <= by_highs(costs, weights, budget) * (1 + 1e-6)


def test_costs_that_follow_the_weights_are_no_trap():
    """Where every bit is worth the same, the bound rules out little: states stay as few as weights are."""
    rng = np.random.default_rng(0)
    weights = [rng.integers(1, 50, 4) for _ in range(60)]
    costs = [-w.astype(float) for w in weights]
    chosen = choose_options(costs, weights, 1501)
    assert total(weights, chosen) == 1501


def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_does():
    costs, weights = [np.zeros(2), np.zeros(1)], [np.array([3, 5]), np.array([4])]
    assert choose_options(costs, weights, 7).tolist() == [0, 0]
    with pytest.raises(pj.Refused, match="Allow at least 7"):
        choose_options(costs, weights, 6)
