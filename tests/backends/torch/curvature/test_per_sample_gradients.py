"""Gradients by example against one backward pass for each example."""

import numpy as np
import pytest
import torch
from torch import nn

from penjing.backends.torch.curvature.output_slopes import directed_gradients, output_slopes
from penjing.backends.torch.curvature.per_sample_gradients import explain_unsupported, per_sample_gradients

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode="reflect", groups=4),
    nn.Conv2d(4, 8, 1, padding="same"),
    nn.Conv2d(4, 8, 2, padding="same", padding_mode="circular"),
]


def agrees(model, modules, x):
    found = per_sample_gradients(model, modules, (x,), lambda y: y.square().sum())
    for i in range(len(x)):
        loss = model(x[i : i + 1]).square().sum()
        expected = torch.autograd.grad(loss, [m.weight for m in modules.values()])
        for name, gradient in zip(modules, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolutions_in_two_dimensions(conv):
    model = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)).eval()
    agrees(model, {"0": conv}, torch.randn(3, 4, 6, 7))


def test_one_dimension_and_linear_layers_over_positions():
    conv, linear = nn.Conv1d(3, 4, 3, stride=2, padding=1, groups=1), nn.Linear(5, 2)
    model = nn.Sequential(conv, nn.Tanh(), linear).eval()
    agrees(model, {"0": conv, "2": linear}, torch.randn(3, 3, 9))


def test_a_layer_called_twice_sums_and_one_that_is_not_called_has_zeros():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.inside(torch.relu(self.inside(x)))

    model = Twice().eval()
    agrees(model, {"inside": model.inside}, torch.randn(3, 4))
    found = per_sample_gradients(model, dict(model.named_children()), (torch.randn(3, 4),), torch.sum)
    assert found["idle"].shape == (3, 4, 4)
    assert not found["idle"].any()


def test_what_is_not_known_is_said():
    assert explain_unsupported(nn.Linear(2, 2)) == ""
    assert "known for linear" in explain_unsupported(nn.Conv3d(1, 1, 1))


def test_slopes_are_the_squared_jacobian_in_the_mean():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).eval()
    x = torch.randn(2, 2, 3, 3)
    hidden = model[0](x)
    jacobian = torch.func.jacrev(lambda h: model[3](h.relu().flatten(1)))
    squares = torch.zeros(3, dtype=torch.float64)
    for i in range(2):
        full = jacobian(hidden[i : i + 1].detach())[0, :, 0]
        squares += (full - full.mean(0)).double().square().sum((0, 2, 3)) / 2
    batches = [((x.numpy(),), np.zeros(2))] * 400
    found = output_slopes(model, {"0": model[0], "3": model[3]}, batches, True, 0)
    np.testing.assert_allclose(found["0"], squares.detach().numpy(), rtol=0.1)
    np.testing.assert_allclose(found["3"], 0.75, rtol=0.1)


def test_directed_gradients_predict_how_the_error_along_them_changes():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval().double()
    x = np.random.default_rng(0).normal(size=(4, 5))
    wanted = model(torch.from_numpy(x)).detach().numpy() + 0.1
    rows, errors = directed_gradients(model, {"0": model[0]}, (x,), wanted, (False, (1, 2)))
    again, _ = directed_gradients(model, {"0": model[0]}, (x,), wanted, (False, (1, 2)))
    np.testing.assert_array_equal(rows, again)
    step = 1e-4 * np.random.default_rng(1).normal(size=30)
    with torch.no_grad():
        model[0].weight += torch.from_numpy(step.reshape(6, 5))
    _, moved = directed_gradients(model, {"0": model[0]}, (x,), wanted, (False, (1, 2)))
    np.testing.assert_allclose(moved - errors, rows @ step, rtol=0.02, atol=1e-6)
