"""PyTorch models become ONNX when a method works on integers."""

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.backends.onnx import BACKEND
from penjing.core.backend import backend_for
from penjing.core.task import Task

RNG = np.random.default_rng(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        return self.fc(x.mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.second(nn.functional.gelu(self.first(x))))
        return self.head(x.mean(1))


def prepared(model, shape, ids=False):
    torch.manual_seed(0)
    model = model().eval()
    if ids:
        x = RNG.integers(0, 20, (96, *shape))
    else:
        x = RNG.standard_normal((96, *shape)).astype(np.float32)
        with torch.no_grad():
            model.train()
            model(torch.from_numpy(x))
            model.eval()
    y = np.arange(96) % 4
    return model, Task(train=(x[:64], y[:64]), valid=(x[64:80], y[64:80]), test=(x[80:], y[80:])).prepare()


@pytest.fixture(scope="module")
def images():
    return prepared(Net, (3, 8, 8))


@pytest.fixture(scope="module")
def tokens():
    return prepared(Tokens, (6,), ids=True)


@pytest.mark.parametrize("name", ["images", "tokens"])
def test_adopted_model_has_the_same_outputs_and_layer_names(name, request):
    model, task = request.getfixturevalue(name)
    x = task.train.inputs[0]
    adopted = BACKEND.adopt(backend_for(model), model, task.train.example())
    with torch.no_grad():
        wanted = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(adopted.run((x,))[0], wanted, rtol=1e-3, atol=1e-4)
    names = [layer.name for layer in BACKEND.layers(adopted)]
    assert names == (["conv1", "conv2", "fc"] if name == "images" else ["embed", "first", "second", "head"])
    assert adopted.reference is None
    assert b"test_onnx_adopt.py" not in adopted.proto.SerializeToString()


def test_plan_from_pytorch_to_corrected_integers(images):
    model, task = images
    applied = pj.apply(model, pj.chain(pj.Int8Static(examples=64), pj.CorrectBias(examples=64)), task)
    assert [(c.method, c.layer) for c in applied.changes if c.done and c.layer != "*"] == [
        (method, layer) for method in ("Int8Static", "CorrectBias") for layer in ("conv1", "conv2", "fc")
    ]
    x = task.test.inputs[0]
    with torch.no_grad():
        wanted = model(torch.from_numpy(x)).numpy()
    got = applied.model.run((x,))[0]
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


def test_tokens_run_dynamic(tokens):
    model, task = tokens
    applied = pj.apply(model, pj.Int8Dynamic(), task)
    assert [c.layer for c in applied.changes if c.done] == ["first", "second", "head", "*"]
    assert "slower" in next(c.reason for c in applied.changes if c.layer == "embed")
