import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from oracles import features as oracle
from penjing.arrays.distillation import uniform_mapping

VECTORS = hnp.arrays(np.float64, (5, 3), elements=st.floats(-9, 9))


@given(VECTORS, st.floats(0.1, 10))
def test_relative_squares_do_not_see_the_scale(x, scale):
    y = x + 10
    assert oracle.relative_squares(x, x) == 0
    assert oracle.relative_squares(x * scale, y * scale) == pytest.approx(
        oracle.relative_squares(x, y), abs=1e-6
    )


def test_attention_is_where_the_squares_are_and_channels_may_differ():
    x = np.zeros((1, 2, 2, 2))
    x[0, :, 0, 1] = [3.0, -1.0]
    assert oracle.attention_map(x).tolist() == [[0, 1, 0, 0]]
    tokens = x.reshape(1, 2, 4).transpose(0, 2, 1)
    assert oracle.attention_map(tokens).tolist() == [[0, 1, 0, 0]]
    wide = np.zeros((1, 7, 2, 2))
    wide[0, 2, 1, 0] = 0.1
    assert oracle.attention_loss(x, wide) == pytest.approx(2 / 4)
    assert oracle.attention_loss(x, 5 * x[:, :1]) == 0


@given(VECTORS, st.floats(0.1, 10), st.integers(0, 1000))
def test_relations_do_not_see_scale_rotation_and_shift(x, scale, seed):
    # Vectors apart enough that their angles are exact.
    x = x + 30 * np.eye(5, 3) + np.arange(5)[:, None]
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    moved = scale * x @ rotation + 7
    assert oracle.relational_loss(x, moved, (25, 50)) == pytest.approx(0, abs=1e-6)


def test_distances_and_angles_by_hand():
    right_angle = np.array([[0.0, 0], [3, 0], [0, 4]])
    assert np.allclose(oracle.distances(right_angle) * 4, [[0, 3, 4], [3, 0, 5], [4, 5, 0]])
    cosines = oracle.cosines(right_angle)
    assert cosines[0, 1, 2] == pytest.approx(0)
    assert cosines[1, 0, 2] == pytest.approx(3 / 5)
    assert oracle.smooth(np.array([0.5, -2.0])) == pytest.approx((0.125 + 1.5) / 2)


def test_relations_of_tokens_do_not_see_padding_nor_the_width():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 4))
    assert oracle.relation_loss(x, x, 2) == 0
    wanted = oracle.relation_loss(x, y, 2)
    assert wanted > 0
    padded = [np.concatenate([z, rng.normal(size=(2, 2, z.shape[-1]))], axis=1) for z in (x, y)]
    seen = np.array([[True, True, True, False, False]] * 2)
    assert oracle.relation_loss(*padded, 2, seen) == pytest.approx(wanted)
    # The same vectors, doubled: products over the root of a width twice as large are as large again.
    doubled = np.concatenate([y, y], axis=-1) / 2**0.25
    assert oracle.relation_loss(x, doubled, 1) == pytest.approx(oracle.relation_loss(x, y, 1), rel=1e-9)


def test_scores_by_hand_and_the_pairs_that_count():
    query = np.array([[[1.0, 0, 2, 0], [0, 1, 0, 2]]])
    key = np.array([[[3.0, 0, 0, 1], [0, 4, 5, 0]]])
    scores = oracle.attention_scores(query, key, 2, 0.5)
    assert scores.tolist() == [[[[1.5, 0], [0, 2]], [[0, 5], [1, 0]]]]
    shared = oracle.attention_scores(query, key[..., :2], 2, 0.5)
    assert shared.tolist() == [[[[1.5, 0], [0, 2]], [[3, 0], [0, 4]]]]
    assert oracle.score_loss(scores, shared) == pytest.approx((9 + 25 + 1 + 16) / 8)
    pairs = np.zeros((1, 2, 2, 2), bool)
    assert oracle.score_loss(scores, shared, pairs) == 0
    pairs[0, 1, 0] = True
    assert oracle.score_loss(scores, shared, pairs) == pytest.approx((9 + 25) / 2)


@given(st.integers(1, 20), st.integers(1, 20))
def test_the_uniform_mapping_rises_to_the_last_layer(student, teacher):
    found = uniform_mapping(student, teacher)
    assert len(found) == student
    assert sorted(found) == list(found)
    assert found[-1] == teacher - 1
    assert found[0] >= 0
    assert student != teacher or found == tuple(range(teacher))
