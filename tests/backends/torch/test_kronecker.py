"""Kronecker factors of layers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402

from penjing.backends.torch.kronecker import factors  # noqa: E402
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
    found = factors(model, ["up", "down", "pointwise", "unused"], Sample(split, "cross_entropy", 3, 4, 0))
    assert sorted(found) == ["down", "pointwise", "up"]
    assert model.training
    seen = np.append(x[:, :4].reshape(-1, 3), np.ones((48, 1)), 1)
    np.testing.assert_allclose(found["up"].inputs, seen.T @ seen / 48, atol=1e-5)
    with torch.no_grad():
        outputs = model(torch.from_numpy(x), torch.from_numpy(mask))
        slopes = outputs.softmax(1).double().numpy() - np.eye(4)[split.targets]
    np.testing.assert_allclose(found["pointwise"].slopes, 4 * slopes.T @ slopes / 12, atol=1e-5)
    weight = model.pointwise.weight[..., 0].detach().double().numpy()
    np.testing.assert_allclose(found["down"].slopes, weight.T @ found["pointwise"].slopes @ weight, atol=1e-5)
