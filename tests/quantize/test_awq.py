"""QuantizeAWQ: what can take the inverse of a scale, and what scaling is worth."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.quant.scaling import Feed, find_feeds, scale_inputs  # noqa: E402
from penjing.backends.torch.quantizers import quantized_layers  # noqa: E402


class Block(nn.Module):
    """Two normalizations, of which only one feeds linear layers alone; gated, ReLU and GELU layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 24)
        self.down, self.other = nn.Linear(24, 16), nn.LayerNorm(16)
        self.one, self.two, self.three = nn.Linear(16, 20), nn.Linear(20, 20), nn.Linear(20, 16)
        # Few inputs are large, as in language models.
        for norm in (self.norm, self.other):
            norm.weight.data = torch.exp(torch.randn(16) * 1.5)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))
        y = self.other(x)
        z = self.two(torch.relu(self.one(y)))
        return y + self.three(nn.functional.gelu(z))


LAYERS = ["gate", "up", "down", "one", "two", "three"]


def block():
    torch.manual_seed(0)
    return Block().eval()


def inputs(count=8):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(count, 5, 16)).astype(np.float32))


def task():
    x, y = inputs(160).numpy(), np.zeros(160, np.int64)
    return pj.Task(train=(x[:96], y[:96]), valid=(x[96:128], y[96:128]), test=(x[128:], y[128:]))


def test_producers_are_found_by_trial_and_weights_are_put_back():
    model = block()
    before = copy.deepcopy(model.state_dict())
    found = find_feeds(model, LAYERS, (inputs(),), 0, lambda name: True)
    assert found == [
        Feed("norm", ("gate", "up")),
        Feed("up", ("down",)),
        Feed("", ("one",)),  # its normalization is added to the output, too
        Feed("one", ("two",)),  # through a ReLU
        Feed("", ("three",)),  # a GELU is not homogeneous
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    kept = find_feeds(model, LAYERS, (inputs(),), 0, lambda name: name != "norm")
    assert kept[0] == Feed("", ("gate", "up"))


def test_scaling_leaves_the_outputs():
    model, x = block(), inputs()
    before = model(x)
    for feed in find_feeds(model, LAYERS, (x,), 0, lambda name: True):
        if feed.producer:
            scale_inputs(model, feed, torch.rand(model.get_submodule(feed.consumers[0]).in_features) + 0.5)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def change(model, method):
    done = pj.apply(model, method, task())
    x = task().prepare().test.arrays()[0]
    return done, float(np.square(BACKEND.run(done.model, x) - BACKEND.run(model, x)).mean())


def test_outputs_change_less_than_by_nearest_rounding_and_layers_say_how():
    model = block()
    form = "uint3 group 8"
    left_out = "!down | !one | !two | !three"
    nearest = change(model, pj.only(left_out, pj.QuantizeNearest(form, None, ends=False)))[1]
    assert change(model, pj.only(left_out, pj.QuantizeAWQ(form, ends=False)))[1] < 0.7 * nearest
    done, _ = change(model, pj.QuantizeAWQ(form, ends=False))
    detail = {c.layer: c.detail for c in done.changes}
    assert detail["gate"]["scaled_by"] == detail["up"]["scaled_by"] == "norm"
    assert detail["gate"]["alpha"] > 0
    assert detail["three"]["scaled_by"] == ""
    assert set(dict(quantized_layers(done.model))) == set(LAYERS)
    exact = change(model, pj.QuantizeAWQ("int16 channel"))[1]
    assert exact < 1e-6


def test_what_cannot_be_scaled_says_so():
    head = nn.Sequential(
        nn.Conv1d(5, 5, 3, padding=1), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
    )
    head[3].weight = head[2].weight
    done = pj.apply(head.eval(), pj.QuantizeAWQ("int4 channel", "int8 token", ends=False), task())
    reasons = {c.layer: c.detail["nearest"] for c in done.changes}
    assert reasons == {
        "0": "it is no linear layer",
        "2": "its weight is 3.weight too",
        "3": "its weight is 2.weight too",
    }
    x, y = np.ones((40, 5, 16), np.float32), np.zeros(40, np.int64)
    flat = pj.Task(train=(x, y), valid=(inputs(8).numpy(), y[:8]))
    with pytest.raises(pj.Refused, match=r"task\.train must vary from example to example"):
        pj.apply(block(), pj.QuantizeAWQ(), flat)
