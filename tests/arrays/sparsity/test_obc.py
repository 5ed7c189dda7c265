"""Exact optimal brain surgeon against least squares, and the division of zeros by error curves."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.arrays.sparsity.allocation import allocate, joined
from penjing.arrays.sparsity.gram import damped, output_error
from penjing.arrays.sparsity.obc import mask_at, obc, refit, removals
from penjing.arrays.sparsity.patterns import Pattern, kept_count, pattern_of


def problem(rows, columns, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5 * columns, columns)) @ rng.normal(size=(columns, columns))
    return rng.normal(size=(rows, columns)), damped(x.T @ x / len(x))


def least_error(weight, gram, mask):
    """By the normal equations, one row at a time."""
    new = np.zeros_like(weight)
    for row, keep in enumerate(mask):
        if keep.any():
            part = gram[np.ix_(keep, keep)]
            new[row, keep] = np.linalg.lstsq(part, gram[keep] @ weight[row], rcond=None)[0]
    return output_error(new - weight, gram), new


def test_the_first_removal_of_each_row_is_the_best_single_one():
    weight, gram = problem(4, 9, 0)
    found = removals(weight, gram, Pattern())
    for row in range(4):
        costs = []
        for column in range(9):
            keep = np.arange(9) != column
            costs.append(least_error(weight[row : row + 1], gram, keep[None, :])[0])
        assert found.order[row, 0] == np.argmin(costs)
        assert found.errors[row, 1] == pytest.approx(min(costs), rel=1e-9)


@pytest.mark.parametrize("text", ["unstructured", "block:1x3", "block:2x1", "block:2x3"])
def test_the_error_at_every_level_is_that_of_least_squares_on_what_is_left(text):
    pattern = pattern_of(text)
    weight, gram = problem(4, 12, 1)
    found = removals(weight, gram, pattern)
    rows, steps = found.order.shape
    assert (rows, steps, found.blocks) == (4 // pattern.rows, 12 // pattern.columns, 12 // pattern.columns)
    for step in range(steps + 1):
        mask = found.mask(np.full(rows, step), pattern)
        assert mask.sum() == 48 - rows * step * pattern.rows * pattern.columns
        assert found.errors[:, step].sum() == pytest.approx(least_error(weight, gram, mask)[0], abs=1e-9)
    assert (np.diff(found.errors, axis=1) >= 0).all()
    assert found.errors[:, -1].sum() == pytest.approx(output_error(weight, gram))


@pytest.mark.parametrize("text", ["unstructured", "block:2x2", "2:4"])
def test_every_step_takes_the_cheapest_block(text):
    """Greedy, step by step, with the error of each choice from least squares."""
    pattern = pattern_of(text)
    weight, gram = problem(2, 8, 2)
    found = removals(weight, gram, pattern)
    for row in range(found.order.shape[0]):
        lines = slice(row * pattern.rows, (row + 1) * pattern.rows)
        gone: list[int] = []
        for chosen in found.order[row]:
            costs = {}
            for block in set(range(found.blocks)) - set(gone):
                group = [b for b in gone if pattern.group and b // 4 == block // 4]
                if len(group) == 2:
                    continue
                tiles = ~np.isin(np.arange(found.blocks), [*gone, block])
                mask = np.repeat(tiles, pattern.columns)[None, :].repeat(pattern.rows, 0)
                costs[block] = least_error(weight[lines], gram, mask)[0]
            assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-6)
            gone.append(int(chosen))


def test_many_rows_and_columns_survive_being_cut_into_parts():
    """More columns than are worked on at once, so that lists shrink on the way."""
    weight, gram = problem(3, 64, 3)
    found = removals(weight, gram, Pattern())
    for counts in ([5, 40, 64], [63, 1, 17]):
        mask = found.mask(np.array(counts), Pattern())
        assert (~mask).sum(1).tolist() == counts
        expected = [found.errors[row, count] for row, count in enumerate(counts)]
        assert sum(expected) == pytest.approx(least_error(weight, gram, mask)[0], rel=1e-6)
    assert all(sorted(row) == list(range(64)) for row in found.order)


def test_weights_are_the_least_squares_ones():
    weight, gram = problem(5, 16, 4)
    new, mask = obc(weight, gram, 0.6, Pattern())
    np.testing.assert_allclose(new, least_error(weight, gram, mask)[1], atol=1e-8)
    assert mask.sum() == kept_count(80, 0.6)
    np.testing.assert_allclose(refit(weight, gram, np.ones_like(mask)), weight, atol=1e-8)


def test_rows_share_the_zeros_by_their_errors():
    weight, gram = problem(2, 10, 5)
    weight[0] *= 100
    mask = mask_at(removals(weight, gram, Pattern()), 0.5, Pattern())
    assert mask[0].sum() > mask[1].sum()
    assert mask.sum() == 10


curves = st.lists(
    st.lists(st.floats(0, 10), min_size=1, max_size=4).map(lambda steps: np.cumsum([0, *steps])),
    min_size=1,
    max_size=3,
)


def test_equal_hulls_are_taken_one_after_the_other():
    flat = np.array([0.0, 5, 5, 5])
    assert allocate([np.array([0.0, 1]), flat, flat], 3).tolist() == [1, 2, 0]
    assert allocate([flat, flat], 3).tolist() == [3, 0]


@given(curves, st.data())
@settings(max_examples=80, deadline=None)
def test_the_division_is_optimal_up_to_one_step_of_a_hull(parts, data):
    sizes = [len(part) - 1 for part in parts]
    removed = data.draw(st.integers(0, sum(sizes)))
    counts = allocate(parts, removed)
    assert counts.sum() == removed
    assert ((counts >= 0) & (counts <= sizes)).all()
    splits = itertools.product(*(range(size + 1) for size in sizes))
    best = min(sum(p[c] for p, c in zip(parts, s, strict=True)) for s in splits if sum(s) == removed)
    found = sum(part[count] for part, count in zip(parts, counts, strict=True))
    gap = max(part.max() - part.min() for part in parts)
    assert best - 1e-9 <= found <= best + gap + 1e-9
    assert joined(parts)[removed] <= best + 1e-9


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=4).map(sorted), min_size=1, max_size=3),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_the_division_is_optimal_for_convex_curves(steps, data):
    parts = [np.cumsum([0, *step]) for step in steps]
    sizes = [len(step) for step in steps]
    removed = data.draw(st.integers(0, sum(sizes)))
    counts = allocate(parts, removed)
    splits = itertools.product(*(range(size + 1) for size in sizes))
    best = min(sum(p[c] for p, c in zip(parts, s, strict=True)) for s in splits if sum(s) == removed)
    found = sum(part[count] for part, count in zip(parts, counts, strict=True))
    assert found == pytest.approx(best, abs=1e-9)
    assert joined(parts)[removed] == pytest.approx(best, abs=1e-9)
