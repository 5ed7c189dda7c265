"""Masks of units: Fisher matrices, the knapsack of widths, rearrangement."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import penjing as pj
from penjing.arrays.structure import mask_search
from penjing.arrays.structure.mask_search import (
    Widths,
    allocate,
    fisher,
    losses_of_widths,
    mask_gradients,
    ranked,
    rearrange,
    width_options,
)
from penjing.core.backend import GateGradients, Group, Slot


def one_block(size):
    return np.zeros(size, np.int64)


def random_widths(rng, groups, options):
    found = []
    for _ in range(groups):
        cost = np.append(0.0, np.sort(rng.integers(1, 20, options - 1)).cumsum())
        loss = np.append(np.sort(rng.random(options - 1).cumsum())[::-1], 0.0)
        found.append(Widths(np.arange(1, options + 1), cost + rng.integers(0, 5), loss))
    return found


def best_by_trying(groups, budget):
    choices = itertools.product(*(range(len(g.cost)) for g in groups))
    totals = (
        (sum(g.loss[i] for g, i in zip(groups, c, strict=True)), c)
        for c in choices
        if sum(g.cost[i] for g, i in zip(groups, c, strict=True)) <= budget
    )
    return min(totals)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1))
def test_the_knapsack_is_the_best_of_all_choices(seed, groups, options, share):
    found = random_widths(np.random.default_rng(seed), groups, options)
    low, high = (sum(float(f(g.cost)) for g in found) for f in (np.min, np.max))
    budget = low + share * (high - low)
    chosen = allocate(found, budget)
    assert sum(g.cost[i] for g, i in zip(found, chosen, strict=True)) <= budget * (1 + 1e-9)
    loss = sum(g.loss[i] for g, i in zip(found, chosen, strict=True))
    least, enough = (best_by_trying(found, budget * (1 + slack))[0] for slack in (1e-8, 0))
    assert least - 1e-9 <= loss <= enough + 1e-9


def test_units_of_equal_cost_go_by_importance_alone():
    """Kwon et al.'s first step: with one kind of unit, the least important of the whole model go."""
    rng = np.random.default_rng(0)
    importance = [rng.random(6), 3 * rng.random(8)]
    widths = []
    for values in importance:
        options = width_options(len(values), one_block(len(values)), 1)
        losses = losses_of_widths(values, ranked(values, one_block(len(values))), options)
        widths.append(Widths(options, options.astype(float), losses))
    kept = [w.kept[i] for w, i in zip(widths, allocate(widths, 7.0), strict=True)]
    threshold = np.sort(np.concatenate(importance))[-7]
    assert kept == [int((values >= threshold).sum()) for values in importance]


def test_the_knapsack_stays_within_the_budget_when_partial_sums_are_thinned(monkeypatch):
    rng = np.random.default_rng(1)
    groups = [
        Widths(np.arange(30), rng.random(30).cumsum(), np.sort(rng.random(30))[::-1].copy()) for _ in range(8)
    ]
    budget = 0.4 * sum(float(g.cost[-1]) for g in groups)
    exact = allocate(groups, budget)
    monkeypatch.setattr(mask_search, "POINTS", 200)
    rough = allocate(groups, budget)
    losses = [sum(g.loss[i] for g, i in zip(groups, chosen, strict=True)) for chosen in (exact, rough)]
    assert sum(g.cost[i] for g, i in zip(groups, rough, strict=True)) <= budget
    assert losses[0] <= losses[1] <= 1.05 * losses[0]


def test_a_budget_below_the_narrowest_widths_is_refused():
    with pytest.raises(pj.Refused, match="narrowest"):
        allocate([Widths(np.array([4]), np.array([5.0]), np.array([0.0]))], 4.9)


def test_widths_are_multiples_that_every_block_shares():
    assert width_options(64, one_block(64), 16).tolist() == [16, 32, 48, 64]
    assert width_options(12, one_block(12), 16).tolist() == [12]
    assert width_options(24, np.repeat([0, 1, 2], 8), 4).tolist() == [12, 24]


def test_units_are_ranked_so_that_blocks_give_in_turn():
    importance, blocks = np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), np.array([0, 0, 0, 1, 1, 1])
    order = ranked(importance, blocks)
    assert order.tolist() == [0, 5, 1, 4, 2, 3]
    assert ranked(np.array([1.0, 2.0, 2.0]), one_block(3)).tolist() == [1, 2, 0]
    assert losses_of_widths(importance, order, np.array([2, 6])).tolist() == [9.0, 0.0]


def removed_loss(matrix, kept):
    gone = np.setdiff1d(np.arange(len(matrix)), kept)
    return float(matrix[np.ix_(gone, gone)].sum())


def test_two_units_that_do_the_same_are_not_both_removed():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(400, 4)) * [1.0, 1.0, 1.1, 1.1]
    g[:, 1] = g[:, 0]
    kept = rearrange(np.array([2, 3]), fisher(g), one_block(4))
    assert len(kept) == 2
    assert len({0, 1} & set(kept.tolist())) == 1


@given(st.integers(0, 10_000), st.integers(4, 9), st.booleans())
def test_no_single_exchange_improves_what_was_rearranged(seed, size, tied):
    rng = np.random.default_rng(seed)
    matrix = fisher(rng.normal(size=(5, size)))
    blocks = np.arange(size) % 2 if tied else one_block(size)
    start = np.sort(ranked(np.diagonal(matrix), blocks)[: 2 * (size // 4)])
    kept = rearrange(start, matrix, blocks)
    loss = removed_loss(matrix, kept)
    assert loss <= removed_loss(matrix, start) + 1e-9
    assert np.bincount(blocks[kept]).tolist() == np.bincount(blocks[start]).tolist()
    for goes in kept:
        for comes in np.setdiff1d(np.arange(size), kept):
            if blocks[goes] == blocks[comes]:
                other = np.append(np.setdiff1d(kept, goes), comes)
                assert removed_loss(matrix, other) >= loss - 1e-6


def test_masks_gather_what_all_consumers_take_of_a_unit():
    slots = (
        Slot("make", "weight", 0, np.array([0, 0, 1, 1]), "out"),
        Slot("first", "weight", 1, np.array([0, 0, 1, 1]), "in"),
        Slot("second", "weight", 1, np.array([-1, 1, 0]), "in"),
    )
    group = Group("make", 2, slots, ("make",), one_block(2), "head")
    batches = [
        GateGradients(1, {"first": np.array([[1.0, 2, 3, 4]]), "second": np.array([[100.0, 10, 20]])}, {}),
        GateGradients(1, {"first": np.array([[0.0, 0, 0, 1]]), "second": np.array([[0.0, 0, 5]])}, {}),
    ]
    found = mask_gradients([group], batches)["make"]
    np.testing.assert_array_equal(found, [[23.0, 17.0], [5.0, 1.0]])
    np.testing.assert_allclose(fisher(found), found.T @ found / 2)
    batches[1] = GateGradients(1, {"first": np.zeros((1, 4))}, {})
    assert mask_gradients([group], batches)["make"] is None
