"""The optimal brain surgeon on units against least squares by hand."""

import itertools

import numpy as np
import pytest

from penjing.arrays.unit_surgeon import Consumer, scores, surgeon
from penjing.core.backend import KroneckerFactors


def layer(seed, columns=6, rows=4, positions=400):
    rng = np.random.default_rng(seed)
    mixed = np.eye(columns) + 0.3 * rng.normal(size=(columns, columns))
    x = rng.normal(size=(positions, columns)) @ mixed + rng.normal(size=columns)
    x = np.append(x, np.ones((positions, 1)), 1)
    g = rng.normal(size=(50, rows)) @ rng.normal(size=(rows, rows))
    weight = rng.normal(size=(rows, columns))
    return x, weight, KroneckerFactors(x.T @ x / positions, g.T @ g / 50)


def refitted_error(x, weight, slopes, kept):
    """Half the weighed squared error when the kept columns and a bias are refitted to the layer's outputs."""
    wanted = x[:, :-1] @ weight.T
    seen = x[:, [*kept, -1]]
    error = wanted - seen @ np.linalg.lstsq(seen, wanted, rcond=None)[0]
    return float(np.einsum("pi,ij,pj->", error, slopes, error)) / len(x) / 2


@pytest.mark.parametrize("units", [np.arange(6), np.array([0, 0, 1, 1, 2, 2])])
def test_losses_are_those_of_layers_refitted_by_least_squares(units):
    x, weight, factors = layer(0)
    size = int(units.max()) + 1
    widths = np.arange(1, size + 1)
    order, losses = surgeon([Consumer(weight, units, factors)], np.zeros(size, np.int64), widths)
    assert sorted(order.tolist()) == list(range(size))
    assert losses[-1] == 0
    for width, loss in zip(widths, losses, strict=True):
        kept = np.flatnonzero(np.isin(units, order[:width]))
        assert loss == pytest.approx(refitted_error(x, weight, factors.slopes, kept), rel=2e-2, abs=1e-9)


def test_each_step_removes_what_costs_least():
    x, weight, factors = layer(1)
    order, losses = surgeon([Consumer(weight, np.arange(6), factors)], np.zeros(6, np.int64), np.arange(1, 7))
    for width in (5, 4, 3):
        kept = order[: width + 1]
        tried = [refitted_error(x, weight, factors.slopes, c) for c in itertools.combinations(kept, width)]
        assert losses[width - 1] == pytest.approx(min(tried), rel=2e-2)


def test_a_unit_that_others_make_up_for_goes_first_and_costs_nothing():
    x, weight, _ = layer(2)
    x[:, 3] = x[:, 0] - 2 * x[:, 1] + 1
    factors = KroneckerFactors(x.T @ x / len(x), np.eye(4))
    order, losses = surgeon([Consumer(weight, np.arange(6), factors)], np.zeros(6, np.int64), np.arange(1, 7))
    assert order[-1] in (0, 1, 3)
    assert losses[-2] < 0.05 * losses[-3]


def test_outputs_that_the_loss_ignores_do_not_count():
    x, weight, _ = layer(3)
    slopes = np.zeros((4, 4))
    slopes[0, 0] = 1.0
    weight[0, 4] = 0.0
    factors = KroneckerFactors(np.diag(np.diag(x.T @ x / len(x))), slopes)
    order, losses = surgeon([Consumer(weight, np.arange(6), factors)], np.zeros(6, np.int64), np.arange(1, 7))
    assert order[-1] == 4
    assert losses[-2] == pytest.approx(0.0, abs=1e-12)


def test_several_consumers_add_up_and_blocks_give_equally():
    parts = [layer(seed) for seed in (4, 5)]
    consumers = [Consumer(weight, np.arange(6), factors) for _, weight, factors in parts]
    blocks, widths = np.array([0, 0, 0, 1, 1, 1]), np.array([2, 4, 6])
    order, losses = surgeon(consumers, blocks, widths)
    for width, loss in zip(widths, losses, strict=True):
        assert np.bincount(blocks[order[:width]]).tolist() == [width // 2] * 2
        expected = sum(refitted_error(x, w, f.slopes, order[:width]) for x, w, f in parts)
        assert loss == pytest.approx(expected, rel=2e-2, abs=1e-9)


def test_scores_rise_in_the_order_of_removal_and_add_up_to_the_loss():
    _, weight, factors = layer(6, columns=8)
    consumers, blocks = [Consumer(weight, np.repeat(np.arange(4), 2), factors)], np.zeros(4, np.int64)
    order, losses = surgeon(consumers, blocks, np.arange(1, 5))
    found = scores(consumers, blocks)
    assert (np.diff(found[order][::-1]) >= 0).all()
    assert found[order[1:]].sum() == pytest.approx(losses[0])
    halves = np.array([0, 1, 0, 1])
    found = scores(consumers, halves)
    pairs = np.sort(found.reshape(2, 2), axis=0)
    np.testing.assert_allclose(pairs[:, 0], pairs[:, 1])
