"""Labels on elements of tensors: reshapes, joins, and which way an axis that was split can shrink."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.arrays.structure.coupling import Coupling
from penjing.arrays.structure.labels import (
    aligned,
    collapsed,
    fixed,
    joined,
    on_axis,
    reshaped,
    segments,
    units_left,
    varying,
)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_reshaped_factor_labels_the_elements_that_it_labelled(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    flat = data.draw(st.permutations(shape))
    factor = on_axis(np.arange(shape[axis]), axis, len(shape))
    whole = np.broadcast_to(factor, shape).reshape(flat)
    found = reshaped(factor, tuple(shape), tuple(flat))
    assert np.array_equal(np.broadcast_to(found, flat), whole)


@given(st.lists(st.integers(1, 5), max_size=5), st.lists(st.integers(1, 5), max_size=5))
def test_segments_cover_both_shapes_in_order(left, right):
    before, after = (*left, *right), (int(np.prod(left)), *right) if left else tuple(right)
    runs = list(segments(before, after))
    assert [axis for axes, _ in runs for axis in axes] == list(range(len(before)))
    assert tuple(n for _, sizes in runs for n in sizes) == after
    for axes, sizes in runs:
        assert np.prod([before[a] for a in axes]) == np.prod(sizes)


def test_collapse_looks_at_classes_and_keeps_the_first_atom():
    classes = np.array([0, 0, 2, 2, -1])
    factor = np.array([[0, 2], [1, 3]])
    assert collapsed(factor, classes).tolist() == [[0, 2]]
    assert varying(collapsed(np.array([[0, 1], [2, 3]]), classes)) == (0,)
    assert varying(collapsed(np.array([[0, -1]]), classes)) == (1,)


def test_join_and_align():
    a, b = on_axis(np.arange(2), 1, 2), fixed(3).reshape(1, 3)
    assert joined([(a, (4, 2)), (b, (4, 3))], 1, [1]).tolist() == [[0, 1, -1, -1, -1]]
    assert joined([(a, (4, 2)), (a, (3, 2))], 0, [0, 1]).shape == (7, 2)
    assert aligned(np.arange(6).reshape(2, 3), [3, 1], 4).shape == (1, 3, 1, 2)
    assert aligned(np.arange(6).reshape(2, 3), [3, 1], 4)[0, 2, 0, 1] == 5


def test_a_split_axis_shrinks_along_the_axis_that_leaves_most_units():
    classes = np.arange(12).reshape(2, 6)
    free = np.zeros((2, 6), bool)
    assert (units_left(classes, free, 0), units_left(classes, free, 1)) == (6, 2)
    # Two heads of queries that are whole already, and a key that stays: heads can go, positions cannot.
    rows = np.array([[0, 0, 0], [1, 1, 1], [2, 3, 4]])
    stays = rows > 1
    assert (units_left(rows, stays, 0), units_left(rows, stays, 1)) == (0, 2)


@pytest.mark.parametrize(("shape", "axis"), [((2, 6), 0), ((6, 2), 1)])
def test_forcing_unites_along_the_short_axis(shape, axis):
    coupling = Coupling()
    atoms = coupling.axis("a", "weight", 0, 12, maker=True)
    coupling.walk()
    coupling.walked()
    coupling.force(atoms.reshape(shape), np.zeros(13, bool), "is split")
    assert coupling.walked()
    assert not coupling.walked()
    assert coupling.collapse(atoms.reshape(shape)).shape[axis] == 1
    coupling.consume(atoms)
    assert coupling.groups().groups[0].size == 6


def test_forcing_keeps_the_lines_of_what_is_fixed_for_good():
    coupling = Coupling()
    atoms = coupling.axis("a", "weight", 0, 6, maker=True)
    coupling.consume(atoms)
    factor = atoms.copy().reshape(2, 3)
    factor[0, 1] = -1
    coupling.force(factor, np.append(np.zeros(6, bool), True), "is split")
    coupling.walked()
    assert coupling.holds(factor).tolist() == [[True, False, True], [True, False, True]]
    coupling.consume(atoms)
    groups = coupling.groups()
    assert groups.groups[0].slots[0].units.tolist() == [0, 1, 2, 0, -1, 2], "atom 1 is not in the factor"


def test_units_in_every_block_need_no_tie_and_slices_part_groups():
    coupling = Coupling()
    rows = coupling.axis("a", "weight", 0, 8, maker=True)
    coupling.consume(rows)
    coupling.unite(rows[:4], rows[4:], "shuffled")
    coupling.tie_blocks(rows, np.arange(8) // 4)
    assert set(coupling.groups().groups[0].blocks.tolist()) == {0}
    coupling.separate(rows[:2])
    coupling.mark(rows[2:4], "head")
    assert [(g.name, g.size, g.kind) for g in coupling.groups().groups] == [
        ("a", 2, "channel"),
        ("a#2", 2, "head"),
    ]


def test_fresh_atoms_are_free_until_they_meet_a_tensor():
    coupling = Coupling()
    copies, rows = coupling.fresh(3, "expand"), coupling.axis("a", "weight", 0, 3, maker=True)
    assert coupling.fresh(3, "expand") is copies
    assert coupling.free(copies)
    assert not coupling.free(rows)
    coupling.unite(copies, rows, "")
    coupling.walked()
    assert not coupling.free(copies)
