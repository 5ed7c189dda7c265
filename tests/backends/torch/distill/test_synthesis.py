"""Inputs made from BatchNorm statistics, and ranges taken from them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.backends.torch.distill.synthesis import synthesize  # noqa: E402
from penjing.core.backend import backend_for  # noqa: E402


def images(n, seed):
    """Images with one loud channel, far from noise of unit variance."""
    rng = np.random.default_rng(seed)
    loud = np.float32([1, 2, 0.3]).reshape(3, 1, 1)
    return (rng.standard_normal((n, 3, 8, 8)).astype(np.float32) + 1) * loud


@pytest.fixture(scope="module")
def net():
    """A network whose BatchNorm has seen such images."""
    torch.manual_seed(0)
    first, second = (nn.Conv2d(width, 8, 3, padding=1) for width in (3, 8))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    body = first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU()
    model = nn.Sequential(*body, *head).train()
    with torch.no_grad():
        for step in range(60):
            model(torch.from_numpy(images(32, step)))
    return model.eval()


def task(x):
    y = np.arange(len(x)) % 4
    return pj.Task(train=(x, y), valid=(x[:8] + 1, y[:8]), test=(x[8:16] + 2, y[8:16]))


def distance(net, x):
    """Mean squared distance of the second BatchNorm's input moments from what it keeps, in its units."""
    with torch.no_grad():
        seen = net[:4](torch.from_numpy(x))
    mean, std = seen.mean((0, 2, 3)), seen.std((0, 2, 3))
    kept = net[4].running_var.sqrt()
    return float((((mean - net[4].running_mean) / kept) ** 2 + (std / kept - 1) ** 2).mean())


def test_moments_come_near_and_nothing_in_the_model_changes(net):
    before = backend_for(net).fingerprint(net)
    noise = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    (made,) = synthesize(net, (noise[:1],), 16, 60, 0)
    assert made.shape == noise.shape
    assert made.dtype == np.float32
    assert distance(net, made) < distance(net, noise) / 4
    assert backend_for(net).fingerprint(net) == before
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    np.testing.assert_array_equal(synthesize(net, (noise[:1],), 16, 60, 0)[0], made)


def error(net, method, x):
    model = pj.apply(net, method, task(x)).model
    real = images(64, 99)
    wanted, found = (backend_for(m).run(m, (real,)) for m in (net, model))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_ranges_without_data_err_less_than_those_of_noise(net):
    blank = np.zeros((32, 3, 8, 8), np.float32)
    blank[:, 0, 0, 0] = np.arange(32)  # shapes and types are all that counts
    made = error(net, pj.QuantizeNearest("int8", "uint6", examples=32, data="synthetic"), blank)
    noise = np.random.default_rng(0).standard_normal(blank.shape).astype(np.float32)
    assert made < error(net, pj.QuantizeNearest("int8", "uint6", examples=32), noise) / 2


def test_models_that_remember_nothing_are_refused(net):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    for method in (pj.QuantizeNearest(data="synthetic"), pj.Int8Static(data="synthetic")):
        with pytest.raises(pj.Refused, match="BatchNorm") as caught:
            pj.apply(plain, method, task(images(32, 0)))
        assert "training data" in caught.value.fix
    quantized = pj.chain(pj.QuantizeNearest(), pj.Int8Static(data="synthetic"))
    with pytest.raises(pj.Refused, match="BatchNorm"):
        pj.apply(net, quantized, task(images(32, 0)))


def test_inputs_that_are_no_floats_are_refused():
    net = nn.Sequential(nn.Embedding(5, 8), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(24, 2)).eval()
    with pytest.raises(pj.Refused, match="must hold floating-point numbers"):
        synthesize(net, (np.zeros((2, 3), np.int64),), 4, 2, 0)


def test_statistics_that_are_broken_are_refused(net):
    broken = backend_for(net).copy(net)
    with torch.no_grad():
        broken[1].running_mean[0] = float("nan")
    with pytest.raises(pj.Refused, match="finite"):
        synthesize(broken, (images(1, 0),), 4, 2, 0)
