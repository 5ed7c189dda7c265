"""Expected rises of the loss against the curvature along the change of weights, taken another way."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from penjing.arrays.formats.clipping import clipped_parameters  # noqa: E402
from penjing.backends.torch.curvature.rounding_loss import rounding_losses  # noqa: E402
from penjing.backends.torch.quantizers import Quantizer, set_quantizers  # noqa: E402
from penjing.core.backend import Sample  # noqa: E402
from penjing.core.number_format import number_format  # noqa: E402
from penjing.core.task import Split  # noqa: E402


def weight_quantizer(module, bits):
    format = number_format(f"int{bits} channel")
    scales = clipped_parameters(module.weight.detach().numpy(), format).scales
    return Quantizer(format, torch.from_numpy(scales))


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(150, 5)
    return torch.nn.Sequential(*layers).eval()


@pytest.fixture
def sample():
    x = np.random.default_rng(0).normal(size=(1024, 2, 5, 5)).astype(np.float32)
    return Sample(Split((x,), np.zeros(1024, np.int64), "train"), "cross_entropy", 32, 32, 0)


def divergence(net, name, bits, sample):
    """The mean Kullback-Leibler divergence of the model with one layer rounded from the model."""
    import copy

    x = torch.from_numpy(sample.split.arrays()[0][0])
    other = copy.deepcopy(net)
    layer = other.get_submodule(name)
    set_quantizers(layer, weight_quantizer(layer, bits), None)
    with torch.no_grad():
        a, b = (model(x).double().log_softmax(1) for model in (net, other))
    return float((a.exp() * (a - b)).sum(1).mean())


def test_they_are_the_divergence_of_the_outputs_to_second_order(net, sample):
    """1,024 random directions give the mean of squares up to about a twentieth."""
    options = {n: [(weight_quantizer(net.get_submodule(n), b), None) for b in (4, 6, 8)] for n in ("0", "3")}
    found = rounding_losses(net, options, sample)
    for name in options:
        wanted = [divergence(net, name, bits, sample) for bits in (4, 6, 8)]
        np.testing.assert_allclose(found[name], wanted, rtol=0.2)


def test_rounded_inputs_count_and_the_model_stays_as_it_was(net, sample):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fine, coarse = (Quantizer(number_format(f"int{b}"), torch.tensor(4 / 2 ** (b - 1))) for b in (8, 3))
    net.train()
    found = rounding_losses(net, {"0": [(None, None), (None, fine), (None, coarse)]}, sample)["0"]
    assert found[0] == 0 < found[1] < found[2] / 100
    assert net.training
    assert type(net[0]) is torch.nn.Conv2d
    assert set(net.state_dict()) == set(before)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_layers_without_influence_cost_nothing_and_calls_add_up(sample):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.idle = torch.nn.Linear(50, 50), torch.nn.Linear(50, 50)

        def forward(self, x):
            x = self.shared(x.flatten(1))
            self.idle(x)
            return self.shared(x)[:, :5]

    torch.manual_seed(1)
    net = Twice().eval()
    options = {n: [(weight_quantizer(getattr(net, n), b), None) for b in (5, 8)] for n in ("shared", "idle")}
    found = rounding_losses(net, options, sample)
    assert found["idle"].tolist() == [0, 0]
    wanted = [divergence(net, "shared", bits, sample) for bits in (5, 8)]
    np.testing.assert_allclose(found["shared"], wanted, rtol=0.2)
