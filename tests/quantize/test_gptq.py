"""QuantizeGPTQ on a small residual network with LayerNorm, convolutions and a tied head."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.arrays.formats.coding import encode  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.quantizers import quantized_layers  # noqa: E402

DATA = {"examples": 64, "ends": False}


class Net(nn.Module):
    """Tokens to logits, the head being the table."""

    def __init__(self, tied=True):
        super().__init__()
        self.table = nn.Embedding(12, 20)
        self.norm, self.up, self.down = nn.LayerNorm(20), nn.Linear(20, 40), nn.Linear(40, 20)
        self.mix = nn.Conv1d(20, 20, 3, padding=1, groups=2)
        self.head = nn.Linear(20, 12, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x + self.mix(x.transpose(1, 2)).transpose(1, 2))


def net(tied=True):
    torch.manual_seed(0)
    return Net(tied).eval()


def task(ids=None):
    ids = np.random.default_rng(0).integers(0, 12, (96, 9)) if ids is None else ids
    y = np.zeros(len(ids), np.int64)
    unseen = np.random.default_rng(1).integers(0, 12, (16, 9))
    return pj.Task(train=(ids, y), valid=(unseen[:8], y[:8]), test=(unseen[8:], y[8:16]))


@pytest.mark.parametrize(
    "name",
    ["int4 channel", "int3 group 8", "uint3 group 8", "nf4 group 16", "mxfp4", "nvfp4", "ternary channel"],
)
@pytest.mark.parametrize("compensate", [False, True])
def test_weights_are_on_their_codes_exactly(name, compensate):
    done = pj.apply(net(), pj.only("!head", pj.QuantizeGPTQ(name, compensate=compensate, **DATA)), task())
    layers = dict(quantized_layers(done.model))
    assert set(layers) == {"up", "down", "mix"}
    for layer in layers.values():
        own, quantizer = layer.weight.detach(), layer.weight_quantizer
        assert torch.equal(quantizer(own), own)
        parts = (quantizer.scale, quantizer.zero_point, quantizer.tensor_scale)
        arrays = (None if part is None else part.detach().numpy() for part in parts)
        codes = encode(own.numpy(), quantizer.format, *arrays).codes
        assert len(np.unique(codes)) <= 2**quantizer.format.bits
    assert all(c.detail["error"] < c.detail["error_nearest"] for c in done.changes if c.done)


def deep(seed):
    """A row of layers on correlated inputs, and data for it."""
    torch.manual_seed(seed)
    layers = [part for _ in range(6) for part in (nn.Linear(24, 24), nn.ReLU())]
    x = torch.randn(512, 6) @ torch.randn(6, 24) + 0.3 * torch.randn(512, 24)
    x, y = x.numpy(), np.zeros(512, np.int64)
    data = pj.Task(train=(x[:400], y[:400]), valid=(x[400:440], y[400:440]), test=(x[440:], y[440:]))
    return nn.Sequential(*layers[:-1]).eval(), data


def lost(method):
    """Squared change of the outputs over their squares, over three networks."""
    total = 0.0
    for seed in range(3):
        model, data = deep(seed)
        x = data.prepare().test.arrays()[0]
        before = BACKEND.run(model, x)
        change = BACKEND.run(pj.apply(model, method, data).model, x) - before
        total += float(np.square(change).sum() / np.square(before - before.mean(0)).sum())
    return total


def test_outputs_stay_nearer_than_by_nearest_rounding_and_most_so_when_aimed_at():
    formats = {"weights": "int2 group 12", "ends": False, "examples": 400}
    nearest = lost(pj.QuantizeNearest(inputs=None, **formats))
    swept = [lost(pj.QuantizeGPTQ(order=order, **formats)) for order in ("activation", "given")]
    aimed = lost(pj.QuantizeGPTQ(compensate=True, **formats))
    assert max(swept) < 0.8 * nearest
    assert aimed < 0.9 * swept[0]


def test_inputs_can_be_rounded_too():
    model = net(tied=False)
    done = pj.apply(model, pj.QuantizeGPTQ("int4 channel", "uint8", **DATA), task())
    assert all(layer.input_quantizer is not None for _, layer in quantized_layers(done.model))
    alone = pj.apply(model, pj.QuantizeGPTQ("int4 channel", **DATA), task()).model
    assert not np.array_equal(
        *(BACKEND.run(m, task().prepare().test.arrays()[0]) for m in (alone, done.model))
    )


def test_what_a_layer_shares_or_a_group_leaves_over_is_said():
    done = pj.apply(net(), pj.QuantizeGPTQ("int4 group 16", **DATA), task())
    detail = {c.layer: c.detail for c in done.changes}
    assert detail["head"]["nearest"] == "its weight is table.weight too"
    assert {name: d.get("last_group") for name, d in detail.items()} == {
        "up": 4,
        "down": 8,
        "mix": 14,
        "head": 4,
    }
    assert torch.equal(done.model.table.weight, net().table.weight)
    few = pj.apply(net(), pj.QuantizeGPTQ("int4 group 16", examples=3, ends=False), task())
    observed = {c.layer: c.detail.get("nearest", "") for c in few.changes}
    assert observed["up"] == ""
    assert observed["down"] == "27 observations of 40 inputs: raise examples"


def test_bad_data_and_bad_weights_are_refused_by_place():
    method = pj.QuantizeGPTQ("int4 channel", **DATA)
    for ids, value in (
        (np.zeros((40, 9), np.int64), 0),
        (np.full((40, 9), 3), 3),
    ):
        with pytest.raises(pj.Refused, match=f"task.train must vary .*got only the value {value}"):
            pj.apply(net(), method, task(ids))
    broken = net(tied=False)
    broken.down.weight.data[2, 3] = float("nan")
    with pytest.raises(pj.Refused, match=r"finite.*down.weight \(1\)"):
        pj.apply(broken, method, task())
    with pytest.raises(pj.Refused, match="needs a model in float"):
        pj.apply(net(), (method, method), task())
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x, y = np.full((40, 4), np.nan, np.float32), np.zeros(40, np.int64)
    with pytest.raises(pj.Refused, match="finite"):
        pj.apply(plain, method, pj.Task(train=(x, y), valid=(np.ones((8, 4), np.float32), y[:8])))
