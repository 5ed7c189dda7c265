"""Layers that round in simulation, and BatchNorm folded before."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.arrays.formats.coding import rounded  # noqa: E402
from penjing.arrays.formats.parameters import parameters_of  # noqa: E402
from penjing.backends.torch import BACKEND, quantizers  # noqa: E402
from penjing.backends.torch.quant.folding import fold_batchnorm  # noqa: E402
from penjing.backends.torch.quantizers import (  # noqa: E402
    CLASSES,
    Quantizer,
    quantized_layers,
    remove_quantizers,
    set_quantizers,
)
from penjing.core.number_format import number_format  # noqa: E402

FORMATS = [
    "int8",
    "uint8",
    "int4 channel",
    "uint4 channel",
    "int3 narrow channel",
    "int4 group 5",
    "uint2 group 4",
]


def quantizer(name, x, learned=False):
    form = number_format(name)
    scales, zeros, _ = parameters_of(x, form)
    zero = None if zeros is None else torch.from_numpy(np.array(zeros, np.float32))
    made = Quantizer(form, torch.from_numpy(np.array(scales, np.float32)), zero)
    made.learned(learned)
    return made


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "name", [*FORMATS, "fp8_e4m3 channel", "nf4", "mxfp4", "ternary channel", "int8 token"]
)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_values_are_those_of_the_reference_bit_for_bit(name, learned, seed):
    x = np.random.default_rng(seed).normal(size=(4, 3, 2, 2)).astype("float32")
    form = number_format(name)
    made = Quantizer(form, torch.ones(())) if form.granularity == "token" else quantizer(name, x, learned)
    reference = parameters_of(x, form)
    found = made(torch.from_numpy(x)).detach().numpy()
    expected = (
        rounded(x, form)
        if form.kind != "integer" or form.granularity == "token"
        else rounded(x, form, *reference)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name", ["int4 channel", "uint3 channel", "uint4 group 24", "int8 narrow group 1000"]
)
def test_a_large_weight_is_rounded_in_parts_to_the_same_values(name, monkeypatch):
    weight = np.random.default_rng(0).normal(size=(9, 5, 50)).astype("float32")
    made, x = quantizer(name, weight), torch.from_numpy(weight)
    whole = made(x)
    monkeypatch.setattr(quantizers, "PART", 600)
    with torch.no_grad():
        assert torch.equal(made(x), whole)
    assert torch.equal(made(x), whole)


def test_gradients_are_those_of_learned_step_sizes():
    """LSQ, equations 3 and 5, by finite differences of the code-wise formula."""
    form = number_format("int3 narrow")
    x = torch.tensor([-5.0, -0.9, -0.2, 0.3, 1.4, 9.0], requires_grad=True)
    made = Quantizer(form, torch.tensor(0.5))
    made.learned()
    made(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    steps = x.detach() / 0.5
    by_hand = torch.where(steps <= -3, -3.0, torch.where(steps >= 3, 3.0, steps.round() - steps)).sum()
    assert float(made.scale.grad) == pytest.approx(float(by_hand) / (6 * 3) ** 0.5)


def test_dropped_values_stay_in_training_mode_only():
    x = torch.linspace(-1, 1, 1001)
    made = quantizer("int2", x.numpy())
    made.drop = 0.5
    torch.manual_seed(0)
    share = float((made.train()(x) == x).float().mean())
    assert 0.45 < share < 0.55
    assert float((made.eval()(x) == x).float().mean()) < 0.01


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.both, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)
        self.fc, self.bn3 = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        y = self.both(x)
        x = self.bn2(y) + y
        return self.bn3(self.fc(x.mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
    return model.eval()


X = np.random.default_rng(0).normal(size=(5, 2, 6, 6)).astype("float32")


def test_batchnorm_is_folded_where_that_changes_nothing(net):
    before = BACKEND.run(net, (X,))
    folded = fold_batchnorm(net, (X,), lambda layer: True)
    assert folded == {"conv": "bn", "fc": "bn3"}, "the output of `both` is used beside its BatchNorm"
    np.testing.assert_allclose(BACKEND.run(net, (X,)), before, atol=1e-5)
    assert isinstance(net.bn, nn.Identity)
    assert isinstance(net.bn2, nn.BatchNorm2d)
    assert net.conv.bias is not None


def test_layers_that_are_not_covered_keep_their_batchnorm(net):
    assert fold_batchnorm(net, (X,), lambda layer: layer == "fc") == {"fc": "bn3"}


@pytest.mark.parametrize("plain", list(CLASSES))
def test_quantized_layers_compute_with_rounded_values_and_go_back(plain):
    torch.manual_seed(0)
    axes = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[plain]
    layer = plain(4, 6) if not axes else plain(4, 6, 3, padding=1)
    x = torch.randn(2, 4, *[5] * axes)
    weight = quantizer("int4 channel", layer.weight.detach().numpy())
    inputs = quantizer("uint4", x.numpy())
    expected = copy.deepcopy(layer)
    expected.weight.data = weight(layer.weight).detach()
    set_quantizers(layer, weight, inputs)
    assert [name for name, _ in quantized_layers(layer)] == [""]
    torch.testing.assert_close(layer(x), expected(inputs(x)))
    assert isinstance(layer, plain)
    assert [found.name for found in BACKEND.layers(layer)] == [""], "quantizers are no layers"
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x))
    remove_quantizers(layer)
    assert type(layer) is plain
    torch.testing.assert_close(layer(x), expected(x))


def test_a_simulation_is_not_delivered(net, tmp_path):
    set_quantizers(net.fc, quantizer("int4 channel", net.fc.weight.detach().numpy()), None)
    for runtime in ("torch", "onnxruntime"):
        if runtime == "onnxruntime":
            pytest.importorskip("onnxruntime")
        with pytest.raises(pj.Refused, match="cannot be a simulation of number formats") as caught:
            pj.deliver(net, pj.Target(runtime), tmp_path / runtime, example=(X,))
        assert "int4 channel in fc" in str(caught.value)
