"""Block Influence, divergence of outputs, and the search for the set of blocks that costs least."""

import itertools
import math

import numpy as np
import pytest

from penjing.arrays.structure.block_influence import block_influence, divergence
from penjing.arrays.structure.removal import Judge, additive_choice, joint_choice

RNG = np.random.default_rng(0)


def test_block_influence_is_one_minus_the_mean_cosine_of_tokens():
    x, y = RNG.normal(size=(2, 3, 5, 7))
    by_hand = [
        1 - x[i, j] @ y[i, j] / np.sqrt((x[i, j] @ x[i, j]) * (y[i, j] @ y[i, j]))
        for i in range(3)
        for j in range(5)
    ]
    assert block_influence(x, y) == pytest.approx(np.mean(by_hand))
    assert block_influence(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert block_influence(x, -x) == pytest.approx(2)


def test_block_influence_of_feature_maps_does_not_depend_on_their_layout():
    x, y = RNG.normal(size=(2, 4, 3, 5, 5))
    moved = (np.moveaxis(a, 1, -1) for a in (x, y))
    assert block_influence(x, y) == pytest.approx(block_influence(*moved))


def test_zero_vectors_are_orthogonal_to_others_and_equal_to_themselves():
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert block_influence(zero, one) == 1
    assert block_influence(zero, zero) == 0


def test_divergence_is_kl_of_classes_along_axis_one_or_relative_error():
    p, q = RNG.normal(size=(2, 6, 4))
    soft = [np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (p, q)]
    by_hand = (soft[1] * np.log(soft[1] / soft[0])).sum(1).mean()
    assert divergence(p, q, logits=True) == pytest.approx(by_hand)
    dense = [np.repeat(z[:, :, None], 3, 2) for z in (p, q)]
    assert divergence(*dense, logits=True) == pytest.approx(by_hand)
    assert divergence(p, q, logits=False) == pytest.approx(((p - q) ** 2).sum() / (q**2).sum())
    assert divergence(np.full((2, 2), np.nan), np.ones((2, 2)), logits=True) == math.inf


def chain(costs, pairs):
    """Return a divergence in which some pairs cost less or more together than alone."""
    return lambda s: (
        sum(costs[i] for i in s) + sum(value for pair, value in pairs.items() if set(pair) <= set(s))
    )


def test_the_joint_search_finds_the_pair_that_the_additive_choice_misses():
    costs = [1.0, 1.1, 3.0, 3.1]
    measure = chain(costs, {(0, 1): 10.0, (2, 3): -5.9})
    assert additive_choice(dict(enumerate(costs)), 2) == (0, 1)
    judge = Judge(measure, 100)
    assert joint_choice(range(4), 2, judge) == (2, 3)
    assert judge.known[2, 3] == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(6))
def test_within_its_limit_the_search_is_near_the_optimum_and_beats_the_sum(seed):
    rng = np.random.default_rng(seed)
    costs = rng.uniform(0.5, 1.5, 14)
    pairs = {pair: rng.normal() for pair in itertools.combinations(range(14), 2)}
    measure = chain(costs, pairs)
    judge = Judge(measure, 150)
    found = joint_choice(range(14), 5, judge)
    values = sorted(measure(s) for s in itertools.combinations(range(14), 5))
    assert len(judge.known) == judge.spent <= 150 < len(values)
    assert measure(found) <= values[len(values) // 50], "among the best of fifty"
    assert measure(found) <= measure(additive_choice(dict(enumerate(costs)), 5))


def test_windows_are_measured_and_no_set_twice():
    seen = []

    def measure(s):
        seen.append(s)
        return 0.0 if s == (9, 10, 11, 12) else 1.0 + 0.1 * len(s)

    assert joint_choice(range(20), 4, Judge(measure, 90)) == (9, 10, 11, 12)
    assert len(seen) == len(set(seen)) <= 90


def test_all_sets_are_measured_where_they_are_few():
    judge = Judge(lambda s: float(sum(s)), 40)
    assert joint_choice(range(6), 3, judge) == (0, 1, 2)
    assert sum(len(s) == 3 for s in judge.known) == 20


def test_a_limit_that_is_spent_leaves_the_best_set_measured():
    judge = Judge(lambda s: float(sum(s)), 7)
    assert joint_choice([3, 4, 5, 6, 7, 8], 3, judge) == (3, 4, 5)
    assert judge.spent == 7
