"""Sparse least squares on gradients by example, and rows of a network that compete."""

import itertools

import numpy as np
import pytest

from penjing.arrays.sparsity.gram import damped, output_error
from penjing.arrays.sparsity.kronecker import network_masks
from penjing.arrays.sparsity.obc import refit, removals
from penjing.arrays.sparsity.patterns import Pattern
from penjing.arrays.sparsity.second_order import Quadratic, best_on_support, best_sparse


def problem(examples=12, size=8, seed=0, ridge=0.05):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(examples, size)) @ rng.normal(size=(size, size))
    errors = rng.normal(size=examples)
    return Quadratic(mixed.astype(np.float32), errors.astype(np.float32), ridge), rng.normal(
        size=size
    ).astype(np.float32)


def largest(count):
    return lambda w: np.isin(np.arange(len(w)), np.argsort(-np.abs(w), kind="stable")[:count])


def test_value_and_slope_agree_and_the_step_is_the_best_along_it():
    quadratic, _ = problem()
    change = np.linspace(-1, 1, 8, dtype=np.float32)
    exact = 0.5 * np.mean((quadratic.errors + quadratic.rows @ change) ** 2) + 0.025 * change @ change
    assert quadratic.value(change) == pytest.approx(float(exact), rel=1e-5)
    for i, slope in enumerate(quadratic.slope(change)):
        d = np.zeros(8, np.float32)
        d[i] = 1e-2
        rise = (quadratic.value(change + d) - quadratic.value(change - d)) / 2e-2
        assert slope == pytest.approx(rise, rel=1e-3, abs=1e-3)
    reached = quadratic.step(change)
    assert all(
        quadratic.value(reached) <= quadratic.value(change + t * (reached - change)) + 1e-4
        for t in (0.0, 0.9, 1.1)
    )


@pytest.mark.parametrize("examples", [4, 12])
def test_the_best_weights_on_a_support_have_no_slope_there(examples):
    quadratic, weights = problem(examples)
    mask = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
    best = best_on_support(quadratic, weights, mask)
    np.testing.assert_array_equal(best[~mask], 0)
    np.testing.assert_allclose(quadratic.slope(best - weights)[mask], 0, atol=2e-4)


def test_thresholding_never_does_worse_than_the_largest_weights_and_is_near_the_best_of_all():
    gaps = []
    for seed in range(10):
        quadratic, weights = problem(seed=seed)
        first = quadratic.value(best_on_support(quadratic, weights, largest(4)(weights)) - weights)
        found = best_sparse(quadratic, weights, largest(4), 20)
        assert np.count_nonzero(found) <= 4
        value = quadratic.value(found - weights)
        assert value <= first + 1e-6
        supports = (np.isin(np.arange(8), c) for c in itertools.combinations(range(8), 4))
        best = min(quadratic.value(best_on_support(quadratic, weights, s) - weights) for s in supports)
        assert value >= best * (1 - 1e-4)
        gaps.append((first - value) / max(first - best, 1e-9))
    assert np.mean(gaps) > 0.3


def layer(rng, rows, columns, groups=1):
    parts = []
    for _ in range(groups):
        x = rng.normal(size=(200, columns)) @ rng.normal(size=(columns, columns))
        parts.append((rng.normal(size=(rows // groups, columns)), damped(x.T @ x / 200)))
    return parts


def cost(parts, masks, slopes):
    total, rows = 0.0, 0
    for (weight, gram), mask in zip(parts, masks, strict=True):
        change = refit(weight, gram, mask) - weight
        for row in change:
            total += slopes[rows] * output_error(row[None], gram)
            rows += 1
    return total


def test_rows_compete_by_what_their_error_costs_at_the_end():
    rng, pattern = np.random.default_rng(0), Pattern()
    layers = {"a": layer(rng, 4, 10), "b": layer(rng, 4, 6, groups=2)}
    found = {name: [removals(w, g, pattern) for w, g in parts] for name, parts in layers.items()}
    slopes = {"a": np.array([1.0, 1.0, 100.0, 1.0]), "b": np.array([1.0, 1.0, 1e-4, 1e-4])}
    masks = network_masks(found, slopes, 0.5, pattern)
    assert sum(int((~m).sum()) for parts in masks.values() for m in parts) == 32
    kept = masks["a"][0].sum(1)
    assert kept[2] > kept[[0, 1, 3]].max()
    assert masks["b"][1].sum(1).tolist() == [1, 1]
    chosen = sum(cost(layers[n], masks[n], slopes[n]) for n in layers)
    even = {
        n: [
            f.mask(np.full(len(w), w.shape[1] // 2), pattern)
            for f, (w, _) in zip(found[n], parts, strict=True)
        ]
        for n, parts in layers.items()
    }
    assert chosen < 0.5 * sum(cost(layers[n], even[n], slopes[n]) for n in layers)


@pytest.mark.parametrize("pattern", [Pattern(2, 1), Pattern(kept=2, group=4)])
def test_patterns_hold(pattern):
    rng = np.random.default_rng(1)
    parts = layer(rng, 4, 8)
    found = {"a": [removals(w, g, pattern) for w, g in parts]}
    (mask,) = network_masks(found, {"a": np.arange(1.0, 5.0)}, 0.5, pattern)["a"]
    assert mask.sum() == 16
    if pattern.group:
        np.testing.assert_array_equal(mask.reshape(4, 2, 4).sum(2), 2)
    else:
        np.testing.assert_array_equal(mask[::2], mask[1::2])


def test_every_row_keeps_something():
    rng = np.random.default_rng(2)
    found = {"a": [removals(w, g, Pattern()) for w, g in layer(rng, 4, 8)]}
    (mask,) = network_masks(found, {"a": np.array([1.0, 0.0, 0.0, 0.0])}, 0.99, Pattern())["a"]
    assert mask.sum(1).min() == 1
