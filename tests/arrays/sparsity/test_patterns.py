"""Patterns: exact counts, the best entries kept, one threshold over several matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.arrays.sparsity.patterns import Pattern, global_masks, kept_count, mask_of, pattern_of

seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0.01, 0.99)


@given(seeds, shares, st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_unstructured_keeps_exactly_so_many_and_the_highest(seed, sparsity, rows, columns):
    score = np.random.default_rng(seed).integers(0, 5, (rows, columns)).astype(float)
    mask = mask_of(score, sparsity, Pattern())
    assert mask.sum() == kept_count(score.size, sparsity)
    if not mask.all():
        assert score[mask].min() >= score[~mask].max()
    by_row = mask_of(score, sparsity, Pattern(), "row")
    assert (by_row.sum(1) == kept_count(columns, sparsity)).all()


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_n_of_every_m_stay(seed, n, more, groups, rows):
    m = n + more
    score = np.random.default_rng(seed).normal(size=(rows, groups * m))
    mask = mask_of(score, 0.1, pattern_of(f"{n}:{m}"))
    assert (mask.reshape(rows, groups, m).sum(2) == n).all()
    kept = np.where(mask, score, np.inf).reshape(-1, m).min(1)
    gone = np.where(mask, -np.inf, score).reshape(-1, m).max(1)
    assert (kept >= gone).all()


@given(seeds, shares, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_blocks_go_as_a_whole(seed, sparsity, r, c, high, wide):
    score = np.random.default_rng(seed).random((r * high, c * wide))
    mask = mask_of(score, sparsity, pattern_of(f"block:{r}x{c}"))
    tiles = mask.reshape(high, r, wide, c).sum((1, 3))
    assert set(np.unique(tiles)) <= {0, r * c}
    assert (tiles > 0).sum() == kept_count(high * wide, sparsity)
    sums = score.reshape(high, r, wide, c).sum((1, 3))
    if not mask.all():
        assert sums[tiles > 0].min() >= sums[tiles == 0].max() - 1e-12


def test_ties_go_to_the_lower_index():
    assert mask_of(np.ones((2, 3)), 0.5, Pattern()).tolist() == [[True, True, True], [False] * 3]


@pytest.mark.parametrize(
    "text", ["", "2:2", "4:2", "0:4", "2:4 ", "block:4", "block:0x1", "rows", "99999:100000"]
)
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        pattern_of(text)


def test_n_of_m_counts_along_the_input_axis_at_one_position_of_the_kernel():
    order = pattern_of("2:4").column_order((1, 4, 3))
    assert order.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert pattern_of("block:1x2").column_order((1, 4, 3)).tolist() == list(range(12))


@pytest.mark.parametrize(
    ("text", "shape", "groups", "word"),
    [
        ("2:4", (8, 6, 3), 1, "inputs"),
        ("block:4x1", (10, 8), 1, "outputs"),
        ("block:4x1", (8, 4, 3), 4, "outputs"),
        ("block:1x4", (8, 3, 3), 1, "columns"),
        ("2:4", (8, 8, 3), 2, ""),
        ("unstructured", (7, 3), 1, ""),
    ],
)
def test_what_does_not_fit_says_why(text, shape, groups, word):
    misfit = pattern_of(text).misfit(shape, groups)
    assert bool(misfit) == bool(word)
    assert word in misfit


def test_one_threshold_for_all_matrices():
    rng = np.random.default_rng(0)
    scores = {"a": 8 * rng.random((4, 5)), "b": 10 * rng.random((6, 5)), "c": 0.01 * rng.random((2, 5))}
    masks = global_masks(scores, 0.6, Pattern(), 0)
    everything = np.concatenate([s.ravel() for s in scores.values()])
    kept = np.concatenate([m.ravel() for m in masks.values()])
    assert kept.sum() == 24
    assert masks["c"].sum() == 1, "one weight stays in any case"
    assert masks["c"].ravel()[scores["c"].argmax()]
    others = kept[:-10]
    assert everything[:-10][others].min() > everything[:-10][~others].max()
    floored = global_masks(scores, 0.6, Pattern(), 0.3)
    assert floored["c"].sum() == 3
    assert sum(m.sum() for m in floored.values()) == 24


def test_blocks_compete_by_their_mean():
    scores = {"a": np.full((4, 2), 1.0), "b": np.full((2, 2), 2.0)}
    masks = global_masks(scores, 0.5, pattern_of("block:2x1"), 0)
    assert masks["b"].all()
    assert masks["a"].sum() == 2


def test_the_same_masks_with_arrays_of_torch():
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    score = np.random.default_rng(1).integers(0, 4, (8, 8)).astype(float)
    for text in ("unstructured", "2:4", "block:2x4"):
        for scope in ("layer", "row"):
            pattern = pattern_of(text)
            found = mask_of(torch.from_numpy(score), 0.5, pattern, scope)
            np.testing.assert_array_equal(found.numpy(), mask_of(score, 0.5, pattern, scope))
