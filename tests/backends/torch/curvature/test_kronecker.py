"""Kronecker factors of layers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402

from penjing.backends.torch.curvature.kronecker import kronecker_factors  # noqa: E402
from penjing.core.backend import Sample  # noqa: E402
from penjing.core.task import Split  # noqa: E402


class Masked(nn.Module):
    """Tokens through two layers, a mean over those that the mask shows; `unused` is never called."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(2, 2)
        self.pointwise = nn.Conv1d(4, 4, 1)

    def forward(self, x, mask):
        y = self.down(torch.tanh(self.up(x)))
        y = self.pointwise(y.transpose(1, 2)).transpose(1, 2)
        return (y * mask[..., None]).sum(1)


def test_factors_are_moments_over_the_positions_that_count():
    torch.manual_seed(0)
    model = Masked().train()
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(12, 6, 3)).astype("float32"), np.ones((12, 6), "float32")
    mask[:, 4:] = 0
    split = Split((x, mask), rng.integers(0, 4, 12), "train")
    layers = ["up", "down", "pointwise", "unused"]
    found = kronecker_factors(model, layers, Sample(split, "cross_entropy", 3, 4, 0))
    assert sorted(found) == ["down", "pointwise", "up"]
    assert model.training
    seen = np.append(x[:, :4].reshape(-1, 3), np.ones((48, 1)), 1)
    np.testing.assert_allclose(found["up"].inputs, seen.T @ seen / 48, atol=1e-5)
    weight = model.pointwise.weight[..., 0].detach().double().numpy()
    np.testing.assert_allclose(found["down"].slopes, weight.T @ found["pointwise"].slopes @ weight, atol=1e-5)


def test_labels_are_those_that_the_model_draws():
    """For one linear layer the factor of slopes tends to the covariance of its predictions."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 3)
    x = np.random.default_rng(0).normal(size=(4000, 2)).astype("float32")
    split = Split((x,), np.zeros(4000, int), "train")
    found = kronecker_factors(layer, [""], Sample(split, "cross_entropy", 8, 500, 0))[""]
    p = layer(torch.from_numpy(x)).softmax(1).detach().double().numpy()
    expected = np.mean([np.diag(row) - np.outer(row, row) for row in p], axis=0)
    np.testing.assert_allclose(found.slopes, expected, atol=0.02)


def test_a_convolution_gives_what_each_of_its_outputs_is_computed_from():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    grouped = nn.Conv2d(3, 3, 1, groups=3)
    model = nn.Sequential(conv, grouped, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = np.random.default_rng(0).normal(size=(5, 2, 6, 6)).astype("float32")
    split = Split((x,), np.zeros(5, int), "train")
    found = kronecker_factors(model, ["0", "1"], Sample(split, "cross_entropy", 1, 5, 0))
    assert list(found) == ["0"], "a convolution with groups has no factors"
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = [
        padded[n, :, i : i + 3, j : j + 3].ravel() for n in range(5) for i in (0, 2, 4) for j in (0, 2, 4)
    ]
    seen = np.append(rows, np.ones((len(rows), 1)), 1)
    np.testing.assert_allclose(found["0"].inputs, seen.T @ seen / len(rows), atol=1e-5)
    assert found["0"].slopes.shape == (3, 3)
