"""Classes, bounds, the order in which units go, and the smallest cut that suffices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.selection import select
from penjing.arrays.structure.cut_cost import multiply_adds_removed, parameters_removed, shares_left
from penjing.arrays.structure.ranking import Bounds, Ranking, bounds, classes, same, smallest_cut, topology
from penjing.arrays.structure.selection import kept_width
from penjing.core.backend import Group, Slot


def group(name, size, layers=(("conv", "weight", 0, "out"), ("next", "weight", 1, "in")), **fields):
    slots = tuple(
        Slot(f"{name}.{layer}", tensor, axis, np.repeat(np.arange(size), fields.get("rows", 1)), role)
        for layer, tensor, axis, role in layers
    )
    blocks = fields.get("blocks", np.zeros(size, np.int64))
    return Group(name, size, slots, (slots[0].layer,), blocks, fields.get("kind", "channel"))


def free(size, step=1):
    return Bounds(step, step, size)


def ranking(groups, scores, members=None, allowed=None):
    allowed = allowed or {g.name: free(g.size) for g in groups}
    return Ranking(members or [[g] for g in groups], scores, allowed)


NORMED = (("conv", "weight", 0, "out"), ("bn", "weight", 0, "out"), ("next", "weight", 1, "in"))
KINDS = {"conv": "conv", "bn": "batchnorm", "next": "conv", "last": "linear"}


def test_isomorphic_groups_are_those_of_equal_topology():
    plain, wide = group("a", 4, NORMED), group("b", 9, NORMED)
    bare, to_linear = group("c", 4), group("d", 4, (*NORMED[:2], ("last", "weight", 1, "in")))
    swapped = group("e", 4, (NORMED[1], NORMED[0], NORMED[2]))
    heads = group("f", 4, NORMED, kind="head")
    groups = [plain, wide, bare, to_linear, swapped, heads]
    kinds = {f"{g.name}.{layer}": kind for g in groups for layer, kind in KINDS.items()}
    found = classes(groups, kinds, "isomorphic")
    assert [[g.name for g in members] for members in found] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    assert classes(groups, kinds, "global") == (tuple(groups),)
    assert classes(groups, kinds, "local") == tuple((g,) for g in groups)
    assert classes([], kinds, "global") == ()
    shared = Group(
        "g",
        4,
        (wide.slots[0], wide.slots[1], Slot("b.conv", "weight", 1, np.arange(4), "in")),
        ("b.conv",),
        np.zeros(4, int),
    )
    assert topology(shared, kinds) != topology(wide, kinds), "one layer that makes and takes its units"


def test_bounds_round_up_the_floor_and_count_rows():
    wide = group("a", 64)
    assert bounds(wide, 8, 0.1, 1.0) == Bounds(8, 8, 64)
    assert bounds(wide, 8, 0.3, 0.8) == Bounds(8, 24, 48)
    assert bounds(group("a", 10), 1, 0.3, 0.7) == Bounds(1, 3, 7), "no loss to floating point"
    assert bounds(wide, 8, 1.0, 0.5) == Bounds(8, 64, 64), "the floor wins"
    assert bounds(group("a", 6), 8, 0.1, 0.5) == Bounds(8, 6, 6), "narrower than a multiple"
    heads = group("a", 12, (("q", "weight", 0, "out"), ("o", "weight", 1, "in")), rows=32, kind="head")
    assert bounds(heads, 16, 0.1, 1.0) == Bounds(1, 2, 12), "a head of 32 rows is a multiple of 16"
    small = group("a", 8, (("q", "weight", 0, "out"), ("o", "weight", 1, "in")), rows=12, kind="head")
    assert bounds(small, 16, 0.0, 1.0) == Bounds(4, 4, 8), "four heads of 12 rows are a multiple of 16"
    blocks = group("a", 12, blocks=np.arange(12) // 4)
    assert bounds(blocks, 2, 0.6, 1.0).low == 12


@given(st.integers(1, 100), st.floats(0.01, 0.99), st.sampled_from([1, 2, 8, 16]), st.integers(0, 9))
def test_local_levels_are_ratios(size, ratio, round_to, seed):
    score = np.random.default_rng(seed).random(size)
    only = group("a", size)
    kept = ranking([only], {"a": score}, allowed={"a": bounds(only, round_to, 0.0, 1.0)}).kept(ratio)
    expected = select(score, ratio, only.blocks, round_to)
    assert len(kept.get("a", range(size))) == kept_width(size, ratio, 1, round_to)
    assert np.array_equal(kept.get("a", np.arange(size)), expected)


def test_one_threshold_for_all_groups_and_never_an_empty_one():
    a, b = group("a", 4), group("b", 4)
    scores = {"a": np.array([0.1, 0.2, 0.3, 0.4]), "b": np.array([5.0, 0.15, 6.0, 7.0])}
    together = ranking([a, b], scores, members=[[a, b]])
    assert {n: k.tolist() for n, k in together.kept(3 / 8).items()} == {"a": [2, 3], "b": [0, 2, 3]}
    assert {n: k.tolist() for n, k in together.kept(5 / 8).items()} == {"a": [3], "b": [0, 2, 3]}
    assert {n: len(k) for n, k in together.kept(1.0).items()} == {"a": 1, "b": 1}
    assert together.kept(0.0) == {}


def test_floors_and_ceilings_hold_at_every_level():
    a, b = group("a", 20), group("b", 20)
    rng = np.random.default_rng(0)
    scores = {"a": rng.random(20) / 100, "b": rng.random(20)}
    allowed = {"a": bounds(a, 1, 0.25, 1.0), "b": bounds(b, 1, 0.0, 0.75)}
    together = ranking([a, b], scores, members=[[a, b]], allowed=allowed)
    for level in np.linspace(0, 1, 21):
        kept = together.kept(level)
        assert len(kept.get("a", range(20))) >= 5
        assert 1 <= len(kept.get("b", range(20))) <= 15


def units(groups):
    return lambda kept: sum(len(kept.get(g.name, range(g.size))) for g in groups)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.floats(0, 1),
    st.sampled_from([1, 4, 8]),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_smallest_cut_is_allowed_and_within_one_step(sizes, share, round_to, together, seed):
    rng = np.random.default_rng(seed)
    groups = [group(f"g{i}", size) for i, size in enumerate(sizes)]
    allowed = {g.name: bounds(g, round_to, 0.0, 1.0) for g in groups}
    order = ranking(
        groups, {g.name: rng.random(g.size) for g in groups}, [groups] if together else None, allowed
    )
    cost, wanted = units(groups), share * sum(sizes)
    kept = smallest_cut(order, cost, wanted)
    if cost(order.kept(1.0)) > wanted:
        assert same(kept, order.kept(1.0)), "the largest cut where none is allowed"
    else:
        assert cost(kept) <= wanted
        # At one level several groups of a local ranking step by one multiple; one too many steps at most.
        assert cost(kept) > wanted - 2 * round_to or not kept


def test_between_two_levels_groups_go_one_at_a_time_the_cheapest_first():
    a, b, c = (group(name, 16) for name in "abc")
    scores = {"a": np.full(16, 3.0), "b": np.full(16, 1.0), "c": np.full(16, 2.0)}
    allowed = {g.name: bounds(g, 8, 0.0, 1.0) for g in (a, b, c)}
    order = ranking([a, b, c], scores, allowed=allowed)
    assert set(smallest_cut(order, units([a, b, c]), 40)) == {"b"}
    assert set(smallest_cut(order, units([a, b, c]), 39)) == {"b", "c"}
    assert set(smallest_cut(order, units([a, b, c]), 48)) == set()


def test_shares_of_tensors_parameters_and_multiply_adds():
    one = group("a", 4, NORMED)
    other = group("b", 2, (("conv", "weight", 0, "out"), ("in", "weight", 1, "in")))
    grouped = Group("c", 4, (Slot("a.conv", "weight", 1, np.arange(4), "in"),), (), np.array([0, 0, 1, 1]))
    kept = {"a": np.array([0]), "c": np.array([0, 2])}
    shares = shares_left([one, other, grouped], kept)
    assert shares == {
        ("a.conv", "weight"): 0.25 * 0.5,
        ("a.bn", "weight"): 0.25,
        ("a.next", "weight"): 0.25,
        ("b.conv", "weight"): 1.0,
        ("b.in", "weight"): 1.0,
    }
    shapes = {
        "a.conv": {"weight": (4, 2, 3, 3)},
        "a.bn": {"weight": (4,)},
        "a.next": {"weight": (5, 4)},
        "b.conv": {"weight": (2, 1)},
        "b.in": {"weight": (1, 2)},
    }
    assert parameters_removed(shares, shapes) == pytest.approx(72 * 7 / 8 + 3 + 15)
    counts = {"a.conv": 720, "a.next": 20, "b.conv": 2, "elsewhere": 9}
    assert multiply_adds_removed(shares, shapes, counts) == pytest.approx(630 + 15)
