"""Rounding learned by signs: where it starts, where it ends, and what it gains."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402

from penjing.arrays.formats.clipping import clipped_parameters  # noqa: E402
from penjing.backends.torch.observe.blockwise import relative_error  # noqa: E402
from penjing.backends.torch.quant.sign_rounding import SignLearning, SignRounding, learn_by_signs  # noqa: E402
from penjing.backends.torch.quantizers import quantized_layers, set_quantizers  # noqa: E402
from penjing.calibration.placing import make_quantizer  # noqa: E402
from penjing.core.number_format import number_format  # noqa: E402

NAMES = [
    "int2 group 8",
    "uint2 group 8",
    "int4 channel",
    "uint3 channel",
    "int3 narrow group 10",
    "uint8 channel",
]


def weight_and_quantizer(name, seed=0):
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
    form = number_format(name)
    return weight, make_quantizer(form, clipped_parameters(weight.numpy(), form))


def round_to(layer, form):
    parameters = clipped_parameters(layer.weight.detach().numpy(), form)
    set_quantizers(layer, make_quantizer(form, parameters), None)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_on_nearest_rounding_and_ends_on_codes(name):
    weight, quantizer = weight_and_quantizer(name)
    rounding = SignRounding(weight, quantizer)
    torch.testing.assert_close(rounding(weight), quantizer(weight), rtol=1e-5, atol=1e-6)
    for _ in range(30):
        (rounding(weight) * torch.randn(6, 20)).sum().backward()
        rounding.step(0.05)
    assert float(rounding.offset.detach().abs().max()) <= 0.5
    assert float(rounding.offset.detach().abs().max()) > 0.1
    found, made = rounding.final(weight, rounding.state())
    assert torch.equal(made(found), found)
    assert made.format == quantizer.format
    assert (made.zero_point is None) == (quantizer.zero_point is None)


def test_gradients_are_straight_through_inside_and_none_outside():
    form = number_format("int2 narrow channel")
    quantizer = make_quantizer(form, clipped_parameters(torch.tensor([[1.0, -1.0, 0.4, 0.2]]).numpy(), form))
    weight = torch.tensor([[5.0, -5.0, 0.4, 0.2]])
    rounding = SignRounding(weight, quantizer)
    rounding(weight).sum().backward()
    step = float(quantizer.scale.detach())
    torch.testing.assert_close(rounding.offset.grad, torch.tensor([[0.0, 0.0, step, step]]))


@pytest.mark.parametrize("name", ["int2 group 8", "uint3 channel"])
def test_a_block_learns_and_is_left_as_it_was_otherwise(name):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 12))
    x = torch.randn(128, 5) @ torch.randn(5, 20) + 0.1 * torch.randn(128, 20)
    with torch.no_grad():
        wanted = block(x)
    rounded = copy.deepcopy(block).train()
    form = number_format(name)
    for layer in (rounded[0], rounded[2]):
        set_quantizers(
            layer, make_quantizer(form, clipped_parameters(layer.weight.detach().numpy(), form)), None
        )
    before = relative_error(rounded, x, wanted)
    again = copy.deepcopy(rounded)
    assert learn_by_signs(rounded, (x, x, wanted), SignLearning(100, 16)) == ["0", "2"]
    assert relative_error(rounded, x, wanted) < 0.7 * before
    assert rounded.training
    assert all(p.requires_grad for p in (rounded[0].weight, rounded[0].bias))
    assert all(p.grad is None for p in rounded.parameters())
    assert torch.equal(rounded[0].bias, block[0].bias)
    for _, layer in quantized_layers(rounded):
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    learn_by_signs(again, (x, x, wanted), SignLearning(100, 16))
    assert torch.equal(again[2].weight, rounded[2].weight)


def test_nothing_gained_leaves_the_start():
    block = nn.Sequential(nn.Linear(4, 4))
    form = number_format("int8 channel")
    set_quantizers(
        block[0], make_quantizer(form, clipped_parameters(block[0].weight.detach().numpy(), form)), None
    )
    x = torch.randn(16, 4)
    with torch.no_grad():
        start, wanted = block[0].weight_quantizer(block[0].weight), block(x)
    learn_by_signs(block, (x, x, wanted), SignLearning(5, 4))
    torch.testing.assert_close(block[0].weight.detach(), start)
