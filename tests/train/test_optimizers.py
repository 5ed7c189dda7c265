"""Every optimizer by name: on a fixed problem, and in the loop."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
pytest.importorskip("pytorch_optimizer", reason="the extra optimizers is not installed")

import penjing as pj  # noqa: E402
from penjing.train.optimizers import KINDS, NAMES, optimizer_of  # noqa: E402
from penjing.train.parameters import make_optimizer  # noqa: E402


def descend(name, decay, steps=3):
    """Return what a few steps on a fixed quadratic make of two numbers."""
    x = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = optimizer_of(name, [{"params": [x], "weight_decay": decay}], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (x * torch.tensor([3.0, 0.5]) * x).sum().backward()
        optimizer.step()
    return x.detach().numpy().ravel()


def written_out(name, decay, steps=3):
    """The same by the formulas of the papers, in float64."""
    x, g = np.array([1.0, -2.0]), np.array([3.0, 0.5])
    m, v = np.zeros(2), np.zeros(2)
    for t in range(1, steps + 1):
        slope = 2 * g * x
        if name == "adamw":
            x = x * (1 - 0.1 * decay)
        else:
            slope = slope + decay * x
        if name == "sgd":
            m = 0.9 * m + slope
            x = x - 0.1 * (slope + 0.9 * m)
        elif name in ("adam", "adamw"):
            m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
            x = x - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        elif name == "adagrad":
            v = v + slope**2
            x = x - 0.1 * slope / (np.sqrt(v) + 1e-10)
        else:
            v = 0.99 * v + 0.01 * slope**2
            m = 0.9 * m + slope / (np.sqrt(v) + 1e-8)
            x = x - 0.1 * m
    return x


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad", "rmsprop"])
def test_steps_are_those_of_the_papers(name, decay):
    np.testing.assert_allclose(descend(name, decay), written_out(name, decay), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_each_descends_and_decays_weights_only(name):
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 3))
    optimizer = make_optimizer(model, list(model.parameters()), pj.FineTune(optimizer=name))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all((decayed[id(p)] > 0) == (p.ndim > 1) for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == KINDS[name].lr


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_a_small_network(name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 8)).astype(np.float32)
    y = (x @ rng.standard_normal((8, 3)).astype(np.float32)).argmax(1)
    task = pj.Task(train=(x[:400], y[:400]), valid=(x[400:500], y[400:500]), test=(x[500:], y[500:]))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    with torch.no_grad():
        before = (model(torch.from_numpy(x[500:])).argmax(1).numpy() == y[500:]).mean()
    recipe = pj.FineTune(
        epochs=20,
        batch_size=32,
        optimizer=name,
        schedule=None if name == "schedule_free" else "warmup_stable_decay",
    )
    trained = pj.apply(model, recipe, task).model
    with torch.no_grad():
        after = (trained(torch.from_numpy(x[500:])).argmax(1).numpy() == y[500:]).mean()
    assert after > max(before + 0.2, 0.7)
