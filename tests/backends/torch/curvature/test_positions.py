"""Which positions count."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402

from penjing.backends.torch.curvature.positions import CHUNK, find_contributing_positions  # noqa: E402


class Masked(nn.Module):
    """Tokens through a layer used once, one used twice and one not at all; a mean of some."""

    def __init__(self):
        super().__init__()
        self.once, self.twice, self.unused, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x, mask):
        y = self.twice(self.twice(torch.tanh(self.once(x))))
        return self.head((y * mask[..., None]).sum(1))


def test_padding_does_not_count():
    rng = np.random.default_rng(0)
    mask = torch.from_numpy((rng.random((2 * CHUNK + 5, 7)) > 0.3).astype("float32"))
    x = torch.from_numpy(rng.normal(size=(*mask.shape, 3)).astype("float32"))
    model = Masked().train()
    found = find_contributing_positions(model, ["once", "twice", "unused", "head"], (x, mask), 0)
    assert list(found) == ["once"], "the others are called twice, never, or on one position"
    np.testing.assert_array_equal(found["once"], mask.bool().numpy())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_several_positions_or_without_gradients_has_nothing_to_tell():
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert find_contributing_positions(plain, ["0"], (torch.ones(4, 3),), 0) == {}

    class Rounded(Masked):
        def forward(self, x, mask):
            return super().forward(x, mask).argmax(-1)

    inputs = torch.ones(4, 2, 3), torch.ones(4, 2)
    assert find_contributing_positions(Rounded(), ["once"], inputs, 0) == {}
