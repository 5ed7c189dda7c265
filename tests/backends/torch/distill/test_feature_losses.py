from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import features as oracle
from penjing.backends.torch.distill import feature_losses as losses

RNG = np.random.default_rng(0)
SEEN = np.array([[True] * 4, [True, True, False, False], [True, False, False, False]])

PAIRS = (SEEN[:, None, :, None] & SEEN[:, None, None, :]).repeat(2, axis=1)


def scores(module, q, k):
    """Of queries of two heads, and keys of two or of one."""
    return module.attention_scores(q, k, 2, 0.5)


CASES = {
    "squares": (losses.relative_squares, oracle.relative_squares, (4, 3, 2, 2), (4, 3, 2, 2)),
    "attention": (losses.attention_loss, oracle.attention_loss, (4, 3, 2, 2), (4, 5, 2, 2)),
    "attention of tokens": (losses.attention_loss, oracle.attention_loss, (4, 6, 2), (4, 6, 3)),
    "relational": (
        lambda a, b: losses.relational_loss(a, b, (25.0, 50.0)),
        lambda a, b: oracle.relational_loss(a, b, (25.0, 50.0)),
        (5, 3),
        (5, 4),
    ),
    "tokens": (
        lambda a, b: losses.relation_loss(a, b, 2, torch.from_numpy(SEEN)),
        lambda a, b: oracle.relation_loss(a, b, 2, SEEN),
        (3, 4, 6),
        (3, 4, 8),
    ),
    "all tokens": (
        lambda a, b: losses.relation_loss(a, b, 3, None),
        lambda a, b: oracle.relation_loss(a, b, 3),
        (3, 4, 6),
        (3, 4, 9),
    ),
    "scores": (
        lambda q, k: losses.score_loss(scores(losses, q, k), scores(losses, k, q), None),
        lambda q, k: oracle.score_loss(scores(oracle, q, k), scores(oracle, k, q)),
        (3, 4, 6),
        (3, 4, 6),
    ),
    "scores of shared keys": (
        lambda q, k: losses.score_loss(
            scores(losses, q, k), scores(losses, q + 1, k + 1), torch.from_numpy(PAIRS)
        ),
        lambda q, k: oracle.score_loss(scores(oracle, q, k), scores(oracle, q + 1, k + 1), PAIRS),
        (3, 4, 6),
        (3, 4, 3),
    ),
    "embedded maps": (
        lambda a, b: losses.relative_squares(losses.pool_positions(a), b),
        lambda a, b: oracle.relative_squares(oracle.embedded(a), b),
        (4, 3, 2, 2),
        (4, 3),
    ),
    "embedded tokens": (
        lambda a, b: losses.relative_squares(losses.pool_positions(a), b),
        lambda a, b: oracle.relative_squares(oracle.embedded(a), b),
        (4, 5, 3),
        (4, 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_agree_with_numpy_and_their_gradients_with_finite_differences(case):
    loss, reference, mine, its = CASES[case]
    student, teacher = RNG.normal(size=mine), RNG.normal(size=its)
    tensor = torch.tensor(student, requires_grad=True)
    value = loss(tensor, torch.tensor(teacher))
    value.backward()
    assert value.item() == pytest.approx(reference(student, teacher), rel=1e-9)
    for index in list(np.ndindex(student.shape))[:: max(1, student.size // 12)]:
        step = np.zeros_like(student)
        step[index] = 1e-6
        slope = (reference(student + step, teacher) - reference(student - step, teacher)) / 2e-6
        assert float(tensor.grad[index]) == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_equal_and_dead_features_have_finite_gradients(case):
    loss, _, mine, its = CASES[case]
    for value in (0.0, 1.0):
        student = torch.full(mine, value, requires_grad=True)
        loss(student, torch.ones(its)).backward()
        assert torch.isfinite(student.grad).all()
        assert torch.isfinite(loss(torch.ones(mine), torch.zeros(its)))


def test_angles_are_those_of_the_first_examples():
    x, y = torch.randn(losses.TRIPLES + 5, 3), torch.randn(losses.TRIPLES + 5, 3)
    found = losses.relational_loss(x, y, (0.0, 1.0))
    assert found == losses.relational_loss(x[: losses.TRIPLES], y[: losses.TRIPLES], (0.0, 1.0))
