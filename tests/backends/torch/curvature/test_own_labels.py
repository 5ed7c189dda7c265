"""Fisher information without labels."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from penjing.backends.torch.curvature.own_labels import OwnLabels  # noqa: E402


def squares(loss, logits, draws):
    """Return the mean outer product of the gradient by the logits over draws of labels."""
    total = np.zeros((logits.shape[1], logits.shape[1]))
    for _ in range(draws // len(logits)):
        z = logits.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loss(z, None) * len(z), z)
        total += g.numpy().T @ g.numpy()
    return total / draws


def test_labels_come_from_the_models_own_predictions():
    p = np.array([0.6, 0.3, 0.1])
    logits = torch.from_numpy(np.log(p)).expand(2000, 3)
    found = squares(OwnLabels("cross_entropy", 0), logits, 20_000)
    np.testing.assert_allclose(found, np.diag(p) - np.outer(p, p), atol=0.02)


def test_other_losses_take_random_directions_of_the_output():
    found = squares(OwnLabels(torch.nn.functional.mse_loss, 0), torch.zeros(2000, 3), 20_000)
    np.testing.assert_allclose(found, np.eye(3), atol=0.05)


def test_the_seed_decides_and_targets_do_not_matter():
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    first, second = (OwnLabels("cross_entropy", 3)(logits, targets) for targets in (None, torch.zeros(64)))
    assert float(first) == float(second)
    assert float(OwnLabels("cross_entropy", 4)(logits, None)) != float(first)


def test_positions_of_sequences_are_drawn_one_by_one():
    logits = torch.full((2, 3, 4), -50.0)
    logits[:, 1] = 50.0
    assert float(OwnLabels("cross_entropy", 0)(logits, None)) == pytest.approx(0.0, abs=1e-6)
