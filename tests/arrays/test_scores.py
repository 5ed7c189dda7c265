"""Every score against numbers by hand or a slow loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.arrays.scores import (
    SCORES,
    activation_score,
    batchnorm_score,
    fisher_score,
    fpgm_score,
    hessian_score,
    l1_score,
    lamp_score,
    output_fisher_score,
    random_score,
    sum_by_unit,
    taylor_score,
)
from penjing.arrays.scores.norms import lamp
from penjing.arrays.scores.units import rows_by_unit
from penjing.core.backend import GateGradients, Group, Slot


def slot(layer, tensor, axis, units, role="out"):
    return Slot(layer, tensor, axis, np.array(units), role)


def chain(size=2, name="a"):
    """Rows and bias of `a`, a BatchNorm, columns of `b` (each unit feeds one column)."""
    units = list(range(size))
    slots = (
        slot(name, "weight", 0, units),
        slot(name, "bias", 0, units),
        slot("bn", "weight", 0, units),
        slot("bn", "bias", 0, units),
        slot("bn", "running_var", 0, units),
        slot("b", "weight", 1, units, "in"),
    )
    return Group(name, size, slots, (name,), np.zeros(size, np.int64))


TENSORS = {
    "a": {"weight": np.array([[3.0], [-1.0]]), "bias": np.array([1.0, -2.0])},
    "bn": {
        "weight": np.array([-0.5, 2.0]),
        "bias": np.array([0.0, 1.0]),
        "running_var": np.array([9.0, 9.0]),
    },
    "b": {"weight": np.array([[4.0, 1.0], [0.0, -1.0]])},
}


def test_l1_sums_every_parameter_and_no_statistic():
    assert l1_score(chain(), TENSORS).tolist() == [3 + 1 + 0.5 + 0 + 4, 1 + 2 + 2 + 1 + 1 + 1]


def test_batchnorm_is_the_scale_or_nothing():
    assert batchnorm_score(chain(), TENSORS).tolist() == [0.5, 2.0]
    without = Group("a", 2, tuple(s for s in chain().slots if s.layer != "bn"), ("a",), np.zeros(2, int))
    assert batchnorm_score(without, TENSORS) is None
    half = Group("a", 2, (slot("bn", "weight", 0, [0, -1]), *without.slots), ("a",), np.zeros(2, int))
    assert batchnorm_score(half, TENSORS) is None, "the second unit has no BatchNorm"


def test_random_depends_on_seed_and_group_only():
    first = random_score(chain(8), 0)
    assert np.array_equal(first, random_score(chain(8), 0))
    assert not np.array_equal(first, random_score(chain(8), 1))
    assert not np.array_equal(first, random_score(chain(8, name="c"), 0))
    assert first.min() >= 0
    assert first.max() < 1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12, unique=True))
def test_lamp_is_each_square_over_those_not_smaller(values):
    squares = np.array(values)
    expected = [v / sum(u for u in values if u >= v) if v else 0 for v in values]
    assert lamp(squares) == pytest.approx(expected)


def test_lamp_of_a_group_and_of_equal_units():
    score = lamp_score(chain(), TENSORS)
    first, second = 9 + 1 + 0.25 + 16, 1 + 4 + 4 + 1 + 1 + 1
    assert score.tolist() == pytest.approx([1.0, second / (first + second)])
    assert lamp(np.ones(4)).tolist() == [1 / 4, 1 / 3, 1 / 2, 1]


def distances(rows):
    return [sum(np.linalg.norm(a - b) for b in rows) for a in rows]


def test_fpgm_is_the_sum_of_distances_over_all_members():
    rows = [[3, 1, -0.5, 0, 4, 0], [-1, -2, 2, 1, 1, -1]]
    assert fpgm_score(chain(), TENSORS).tolist() == pytest.approx(distances(np.array(rows)))


def test_fpgm_by_brute_force_with_a_repeated_axis_and_a_grouped_convolution():
    rng = np.random.default_rng(0)
    tensors = {
        "a": {"weight": rng.normal(size=(4, 2, 3))},
        "flat": {"weight": rng.normal(size=(5, 8))},
        "grouped": {"weight": rng.normal(size=(6, 2, 3))},
    }
    slots = (
        slot("a", "weight", 0, [0, 1, 2, 3]),
        slot("flat", "weight", 1, [0, 0, 1, 1, 2, 2, 3, 3], "in"),
        slot("grouped", "weight", 1, [0, 1, 2, 3], "in"),
    )
    group = Group("a", 4, slots, ("a",), np.array([0, 0, 1, 1]))
    a, flat, grouped = (tensors[name]["weight"] for name in ("a", "flat", "grouped"))
    rows = [
        np.concatenate(
            [
                a[u].ravel(),
                flat[:, 2 * u].ravel(),
                flat[:, 2 * u + 1].ravel(),
                grouped[3 * (u // 2) : 3 * (u // 2) + 3, u % 2].ravel(),
            ]
        )
        for u in range(4)
    ]
    assert fpgm_score(group, tensors).tolist() == pytest.approx(distances(rows))
    assert l1_score(group, tensors).tolist() == pytest.approx([np.abs(row).sum() for row in rows])


def test_rows_of_units_with_unequal_entries_end_with_zeros():
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    rows = rows_by_unit(values, slot("l", "weight", 1, [1, -1, 0, 1]), 3)
    assert rows.tolist() == [[3, 0], [1, 4], [0, 0]]


def test_taylor_sums_before_squaring_and_averages_after():
    ones = {layer: {name: np.ones_like(v) for name, v in own.items()} for layer, own in TENSORS.items()}
    first, second = 3 + 1 - 0.5 + 0 + 4 + 0, -1 - 2 + 2 + 1 + 1 - 1
    twice = [ones, {"a": ones["a"]}]
    found = taylor_score([chain()], TENSORS, twice)["a"]
    assert found.tolist() == [(first**2 + 4**2) / 2, (second**2 + 3**2) / 2]


def test_fisher_sums_consumers_before_squaring_and_output_fisher_does_not():
    two = Group("a", 2, (*chain().slots, slot("c", "weight", 1, [1, 0], "in")), ("a",), np.zeros(2, int))
    batches = [
        GateGradients(
            1,
            {"b": np.array([[1.0, 2.0]]), "c": np.array([[3.0, 4.0]])},
            {"b": np.array([[1.0, 5.0]]), "c": np.array([[9.0, 7.0]])},
        ),
        GateGradients(
            1,
            {"b": np.array([[0.0, -2.0]]), "c": np.array([[1.0, 0.0]])},
            {"b": np.array([[0.0, 4.0]]), "c": np.array([[1.0, 0.0]])},
        ),
    ]
    assert fisher_score([two], batches)["a"].tolist() == [(5**2 + 0) / 2, (5**2 + 1) / 2]
    assert output_fisher_score([two], batches)["a"].tolist() == [(1 + 7 + 0 + 0) / 4, (5 + 9 + 4 + 1) / 4]


def test_a_consumer_that_is_not_seen_leaves_its_group_out():
    batch = GateGradients(1, {"x": np.ones((1, 2))}, {"x": np.ones((1, 2))})
    assert fisher_score([chain()], [batch]) == {}
    assert output_fisher_score([chain()], [batch]) == {}
    assert activation_score([chain()], TENSORS, [{"x": np.ones((1, 2))}]) == {}
    nobody = Group("a", 2, chain().slots[:2], ("a",), np.zeros(2, int))
    assert fisher_score([nobody], [batch]) == output_fisher_score([nobody], [batch]) == {}
    assert activation_score([nobody], TENSORS, [{"b": np.ones((1, 2))}]) == {}
    narrow = GateGradients(1, {"b": np.ones((1, 3))}, {"b": np.ones((1, 3))})
    assert fisher_score([chain()], [narrow]) == {}, "three channels for two units"


def test_hessian_by_hand():
    diagonal = {
        layer: {name: np.full_like(v, 2.0) for name, v in own.items()} for layer, own in TENSORS.items()
    }
    squares = [9 + 1 + 0.25 + 0 + 16, 1 + 4 + 4 + 1 + 1 + 1]
    assert hessian_score([chain()], TENSORS, [diagonal, diagonal])["a"].tolist() == squares
    assert hessian_score([chain()], TENSORS, [diagonal, {}])["a"].tolist() == [s / 2 for s in squares]


def test_activation_by_hand():
    batches = [{"b": np.array([[3.0, 1.0], [4.0, 0.0]])}, {"b": np.array([[0.0, 1.0], [0.0, 1.0]])}]
    # Norms per example: sqrt((9 + 16) / 4), sqrt((1 + 1 + 1) / 4); weights 4 + 0 and 1 + 1.
    assert activation_score([chain()], TENSORS, batches)["a"].tolist() == pytest.approx(
        [4 * 2.5, 2 * 0.75**0.5]
    )
    image = np.arange(8.0).reshape(1, 2, 2, 2)
    tensors = {**TENSORS, "b": {"weight": np.array([[[[2.0]], [[-1.0]]]])}}
    norms = np.sqrt([0 + 1 + 4 + 9, 16 + 25 + 36 + 49])
    assert activation_score([chain()], tensors, [{"b": image}])["a"].tolist() == pytest.approx(
        [2 * norms[0], norms[1]]
    )


def test_every_score_names_its_source():
    for name, score in SCORES.items():
        assert score.function.__name__ == f"{name}_score"
        assert "et al" in score.function.__doc__ or "LeCun" in score.function.__doc__


@given(st.integers(0, 10**6))
def test_sums_by_unit_equal_a_loop(seed):
    rng = np.random.default_rng(seed)
    size, length = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    seen = slot("l", "weight", 1, rng.integers(-1, size, length))
    values = rng.normal(size=(3, length, 2))
    expected = np.zeros(size)
    for index, unit in enumerate(seen.units):
        if unit >= 0:
            expected[unit] += values[:, index].sum()
    assert sum_by_unit(values, seen, size) == pytest.approx(expected)
