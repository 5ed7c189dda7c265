"""Coupling and scores on their own, without any framework."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.selection import select
from penjing.arrays.scores import l2_score, sum_by_unit, taylor_score
from penjing.arrays.structure.coupling import Coupling, fixed
from penjing.arrays.structure.selection import kept_width
from penjing.core.backend import Slot


def two_layers(size=4):
    """A net of two linear layers: rows of `a` feed columns of `b`."""
    coupling = Coupling()
    rows = coupling.axis("a", "weight", 0, size, maker=True)
    columns = coupling.axis("b", "weight", 1, size)
    out = coupling.axis("b", "weight", 0, 2, maker=True)
    coupling.unite(rows, columns, "fixed")
    coupling.consume(columns)
    return coupling, rows, out


def test_rows_and_columns_make_a_group_and_the_output_is_frozen():
    coupling, _, out = two_layers()
    coupling.freeze(out, "is the output")
    groups = coupling.groups()
    [group] = groups.groups
    assert (group.name, group.size, group.layers) == ("a", 4, ("a",))
    assert [(s.layer, s.axis, s.role, s.units.tolist()) for s in group.slots] == [
        ("a", 0, "out", [0, 1, 2, 3]),
        ("b", 1, "in", [0, 1, 2, 3]),
    ]
    assert groups.frozen == {"b": "is the output"}
    assert coupling.staying({"a": np.array([1, 3])})[[0, 1, 2, 3, -1]].tolist() == [
        False,
        True,
        False,
        True,
        True,
    ]


def test_meeting_a_fixed_coordinate_freezes_only_that_unit():
    coupling, rows, _ = two_layers()
    other = coupling.fresh(4)
    other[2] = -1
    coupling.unite(rows, other, "is added to a constant")
    [group] = coupling.groups().groups
    assert group.size == 3
    assert group.slots[0].units.tolist() == [0, 1, -1, 2]


def test_a_first_reason_counts_and_nobody_consumes_is_one():
    coupling, rows, _ = two_layers()
    coupling.freeze(rows[:1], "first")
    coupling.freeze(rows, "second")
    assert coupling.groups().frozen == {"a": "first", "b": "no layer consumes its channels"}
    assert Coupling().groups().groups == ()


def test_blocks_come_together_or_freeze():
    coupling, rows, _ = two_layers()
    coupling.tie_blocks(rows, np.array([0, 0, 1, 1]))
    assert coupling.groups().groups[0].blocks.tolist() == [0, 0, 1, 1]
    coupling, rows, _ = two_layers()
    coupling.unite(rows[:1], rows[2:3], "")
    coupling.tie_blocks(rows, np.array([0, 0, 1, 1]))
    assert coupling.groups().groups == (), "a unit in two blocks"
    coupling, rows, _ = two_layers(12)
    coupling.tie_blocks(rows, np.arange(12) // 6)
    coupling.tie_blocks(rows, np.arange(12) // 4)
    assert coupling.groups().groups == (), "ties of 2 and of 3 that no equal removal serves"
    coupling, rows, _ = two_layers(12)
    coupling.tie_blocks(rows, np.arange(12) // 6)
    coupling.tie_blocks(rows, np.arange(12) // 3)
    assert len(set(coupling.groups().groups[0].blocks)) == 4, "nested ties: the finer one"


def test_sums_by_unit_on_plain_repeated_and_grouped_axes():
    values = np.arange(12.0).reshape(3, 4)
    assert sum_by_unit(values, Slot("l", "w", 1, np.array([0, 0, 1, -1]), "in"), 2).tolist() == [27, 18]
    grouped = np.arange(8.0).reshape(4, 2, 1)
    sums = sum_by_unit(grouped, Slot("l", "w", 1, np.array([0, 1, 2, 3]), "in"), 4)
    assert sums.tolist() == [0 + 2, 1 + 3, 4 + 6, 5 + 7]


def test_scores_by_hand():
    [group] = two_layers(2)[0].groups().groups
    tensors = {"a": {"weight": np.array([[3.0], [1.0]])}, "b": {"weight": np.array([[4.0, 1.0], [0.0, 1.0]])}}
    assert l2_score(group, tensors).tolist() == [5.0, pytest.approx(3**0.5)]
    one = {"a": {"weight": np.array([[1.0], [2.0]])}, "b": {"weight": np.ones((2, 2))}}
    assert taylor_score([group], tensors, [one, {}])["a"].tolist() == [(3 + 4) ** 2 / 2, (2 + 2) ** 2 / 2]


@given(
    st.integers(1, 200),
    st.floats(0.01, 0.99),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 32),
    st.integers(0, 9),
)
def test_selection_is_fair_rounded_and_greedy(per_block, ratio, blocks, round_to, seed):
    size = per_block * blocks
    names = np.arange(size) % blocks
    score = np.random.default_rng(seed).random(size)
    kept = select(score, ratio, names, round_to)
    assert len(kept) == kept_width(size, ratio, blocks, round_to) >= 1
    assert len(kept) % round_to == 0 or len(kept) == size
    assert (np.diff(kept) > 0).all()
    for block in range(blocks):
        mine = kept[names[kept] == block]
        gone = np.setdiff1d(np.flatnonzero(names == block), mine)
        assert len(mine) == len(kept) // blocks
        assert not len(gone) or score[mine].min() >= score[gone].max()


def test_fixed_labels():
    assert fixed(3).tolist() == [-1, -1, -1]
