import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penjing.arrays.distillation import hinton_gradient, hinton_loss, log_softmax, standardize

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
