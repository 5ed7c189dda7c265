import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from oracles.distillation import (
    correlation,
    correlation_loss,
    decoupled_loss,
    generalized_divergence,
    hinton_gradient,
    hinton_loss,
    listwise_loss,
    log_softmax,
    softened_mean,
    standardize,
)

LOGITS = hnp.arrays(np.float64, (3, 5), elements=st.floats(-50, 50))


@given(LOGITS)
def test_standardized_rows_have_mean_zero_and_no_scale(z):
    rows = standardize(z)
    assert np.allclose(rows.mean(axis=1), 0, atol=1e-6)
    varied = z.std(axis=1) > 0.1
    assert np.allclose(rows[varied].std(axis=1), 1, atol=1e-3)
    assert np.allclose(standardize(7 * z + 3)[varied], rows[varied], atol=1e-3)


@given(LOGITS, LOGITS, st.floats(0.5, 8))
def test_loss_is_zero_for_equals_and_never_negative(student, teacher, temperature):
    assert hinton_loss(teacher, teacher, temperature) == 0
    assert hinton_loss(student, teacher, temperature) >= -1e-9


def test_loss_by_hand_for_two_classes():
    p, q = 1 / (1 + np.exp(-1.0)), 0.5
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / q))
    assert hinton_loss(np.zeros((1, 2)), np.array([[2.0, 0.0]]), 2.0) == pytest.approx(expected)


def test_gradient_agrees_with_finite_differences():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 3, 4))
    gradient = hinton_gradient(student, teacher, 3.0)
    for row, column in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[row, column] = 1e-5
        slope = (hinton_loss(student + step, teacher, 3.0) - hinton_loss(student - step, teacher, 3.0)) / 2e-5
        assert gradient[row, column] == pytest.approx(slope, abs=1e-8)


def test_log_softmax_survives_large_logits():
    assert np.allclose(log_softmax(np.array([[1e4, 0.0]])), [[0.0, -1e4]])


LABELS = np.array([0, 4, 2])


@given(LOGITS, LOGITS, st.floats(0.5, 8))
def test_hintons_loss_is_the_decoupled_one_with_the_teachers_weights(student, teacher, temperature):
    """As Zhao et al. derive it: KD = target part + (1 - p of the label) times the part of the others."""
    p = np.exp(log_softmax(teacher / temperature))[np.arange(3), LABELS]
    rows = [
        decoupled_loss(student[i : i + 1], teacher[i : i + 1], LABELS[i : i + 1], (1, 1 - p[i]), temperature)
        for i in range(3)
    ]
    wanted = hinton_loss(student, teacher, temperature)
    assert np.mean(rows) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@given(LOGITS, LOGITS)
def test_correlation_is_numpys_and_its_loss_has_its_bounds(a, b):
    if min(a.std(axis=1).min(), b.std(axis=1).min()) > 1e-3:
        wanted = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
        assert np.allclose(correlation(a, b), wanted, atol=1e-6)
    assert -1e-9 <= correlation_loss(a, b, (1, 1), 2.0) <= 4 * 4 + 1e-9
    assert correlation(np.ones((1, 3)), np.array([[1.0, 2, 3]])) == 0


def test_distillation_by_correlation_does_not_see_the_scale_of_probabilities():
    p = np.array([[0.2, 0.3, 0.5], [0.6, 0.25, 0.15]])
    assert correlation_loss(np.log(p), np.log(p), (2, 2), 1.0) == pytest.approx(0)
    flatter = (p + 1 / 3) / 2
    assert correlation_loss(np.log(flatter), np.log(p), (2, 2), 1.0) == pytest.approx(0, abs=1e-9)


@given(LOGITS, LOGITS)
def test_rankings_differ_by_the_divergence_and_padding_counts_nothing(student, teacher):
    plain = listwise_loss(student, teacher, 1.0)
    assert plain == pytest.approx(hinton_loss(student, teacher, 1.0), abs=1e-9)
    padded = [np.pad(z, ((0, 1), (0, 2)), constant_values=v) for z, v in ((student, 7.0), (teacher, -np.inf))]
    padded[1][-1, 0] = 3.0  # a row with one candidate
    assert listwise_loss(*padded, 1.0) == pytest.approx(plain * 3 / 4, abs=1e-9)
    assert listwise_loss(padded[0][-1:], padded[1][-1:], 1.0) == 0


@given(hnp.arrays(np.float64, (2, 3, 4), elements=st.floats(-20, 20)), st.floats(0.5, 8))
def test_several_teachers_are_the_mean_of_their_softened_distributions(logits, temperature):
    weights = np.array([1.0, 2.0, 5.0])
    found = np.exp(log_softmax(softened_mean(logits, weights, temperature) / temperature))
    wanted = np.average(np.exp(log_softmax(logits / temperature)), axis=1, weights=weights)
    assert np.allclose(found, wanted)


BETA = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99))


@given(LOGITS, LOGITS, BETA)
def test_the_generalized_divergence_is_symmetric_in_its_ends_and_bounded_between(student, teacher, beta):
    found = generalized_divergence(student, teacher, beta)
    assert generalized_divergence(teacher, teacher, beta) == pytest.approx(0, abs=1e-12)
    assert found == pytest.approx(generalized_divergence(teacher, student, 1 - beta), rel=1e-6, abs=1e-9)
    assert found >= -1e-9
    assert beta in (0, 1) or found <= np.log(2) + 1e-9


def test_the_generalized_divergence_by_hand_and_near_its_ends():
    student, teacher = np.log([[0.5, 0.5]]), np.log([[0.8, 0.2]])
    forward = 0.8 * np.log(1.6) + 0.2 * np.log(0.4)
    reverse = -0.5 * np.log(1.6) - 0.5 * np.log(0.4)
    assert generalized_divergence(student, teacher, 0) == pytest.approx(forward)
    assert generalized_divergence(student, teacher, 1) == pytest.approx(reverse)
    assert generalized_divergence(student, teacher, 1e-6) / 1e-6 == pytest.approx(forward, rel=1e-4)
    assert generalized_divergence(student, teacher, 1 - 1e-6) / 1e-6 == pytest.approx(reverse, rel=1e-4)
    p, q = np.array([0.8, 0.2]), np.array([0.5, 0.5])
    m = 0.3 * p + 0.7 * q
    wanted = 0.3 * (p * np.log(p / m)).sum() + 0.7 * (q * np.log(q / m)).sum()
    assert generalized_divergence(student, teacher, 0.3) == pytest.approx(wanted)
