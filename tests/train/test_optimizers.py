"""Every optimizer by name: against the formulas of its paper on fixed problems, and in the loop."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
pytest.importorskip("pytorch_optimizer", reason="the extra optimizers is not installed")

import penjing as pj  # noqa: E402
from penjing.train.optimizers import NAMES, OPTIMIZERS, build_optimizer  # noqa: E402
from penjing.train.parameters import make_optimizer  # noqa: E402

START = np.random.default_rng(7).standard_normal((4, 3))
LEFT, RIGHT = np.diag([3.0, 0.5, 1.0, 0.2]) + 0.1, np.diag([1.0, 0.4, 2.0]) + 0.2
RATES = [0.02, 0.05, *[0.1] * 13]
"""As a warm-up gives them; `adadelta` and `prodigy`, whose own rate is 1, take ten times as much."""


def slope(x):
    """Gradient of a quadratic of a matrix `[4, 3]`, none of whose axes are alike."""
    return LEFT @ (x - 0.3) @ RIGHT


def descend(name, decay, rates, **extra):
    """Return what steps of these rates make of START, in the weights that a model is judged by."""
    x = torch.nn.Parameter(torch.from_numpy(START.copy()))
    optimizer = build_optimizer(name, [{"params": [x], "weight_decay": decay, **extra}], rates[0])
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        x.grad = torch.from_numpy(slope(x.detach().numpy()))
        optimizer.step()
    if OPTIMIZERS[name].modes:
        optimizer.eval()
    return x.detach().numpy()


def sgd(x, decay, rates):
    """Sutskever et al. 2013, as frameworks write it."""
    m = np.zeros_like(x)
    for rate in rates:
        g = slope(x) + decay * x
        m = 0.9 * m + g
        x = x - rate * (g + 0.9 * m)
    return x


def adam(x, decay, rates, decoupled=False):
    """Kingma and Ba 2015, algorithm 1; with `decoupled` Loshchilov and Hutter 2019, algorithm 2."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, rate in enumerate(rates, 1):
        g = slope(x) + (0 if decoupled else decay * x)
        x = x * (1 - rate * decay) if decoupled else x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


def adamw(x, decay, rates):
    """Loshchilov and Hutter 2019."""
    return adam(x, decay, rates, decoupled=True)


def nadam(x, decay, rates):
    """Dozat 2016, algorithm 8, with its momentum schedule 0.96^(0.004 t)."""
    m, v, product = np.zeros_like(x), np.zeros_like(x), 1.0
    for t, rate in enumerate(rates, 1):
        g = slope(x)
        now, after = (0.9 * (1 - 0.5 * 0.96 ** (0.004 * step)) for step in (t, t + 1))
        product *= now
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        ahead = after * m / (1 - product * after) + (1 - now) * g / (1 - product)
        x = x * (1 - rate * decay) - rate * ahead / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


def radam(x, decay, rates):
    """Liu et al. 2020, algorithm 2; rectified from a length of 5 on, as the authors' own code does."""
    m, v, most = np.zeros_like(x), np.zeros_like(x), 2 / (1 - 0.999) - 1
    for t, rate in enumerate(rates, 1):
        g = slope(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        length = most - 2 * t * 0.999**t / (1 - 0.999**t)
        move = m / (1 - 0.9**t)
        if length > 5:
            rectified = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
            move = move * math.sqrt(rectified) / np.sqrt(v / (1 - 0.999**t))
        x = x * (1 - rate * decay) - rate * move
    return x


def adamax(x, decay, rates):
    """Kingma and Ba 2015, algorithm 2."""
    m, u = np.zeros_like(x), np.zeros_like(x)
    for t, rate in enumerate(rates, 1):
        g = slope(x) + decay * x
        m, u = 0.9 * m + 0.1 * g, np.maximum(0.999 * u, np.abs(g))
        x = x - rate / (1 - 0.9**t) * m / u
    return x


def rmsprop(x, decay, rates):
    """Tieleman and Hinton 2012, with momentum."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for rate in rates:
        g = slope(x) + decay * x
        v = 0.99 * v + 0.01 * g**2
        m = 0.9 * m + g / (np.sqrt(v) + 1e-8)
        x = x - rate * m
    return x


def adagrad(x, decay, rates):
    """Duchi et al. 2011."""
    v = np.zeros_like(x)
    for rate in rates:
        g = slope(x) + decay * x
        v = v + g**2
        x = x - rate * g / (np.sqrt(v) + 1e-10)
    return x


def adadelta(x, decay, rates):
    """Zeiler 2012, algorithm 1, times a rate."""
    v, moved = np.zeros_like(x), np.zeros_like(x)
    for rate in rates:
        g = slope(x) + decay * x
        v = 0.9 * v + 0.1 * g**2
        move = np.sqrt(moved + 1e-6) / np.sqrt(v + 1e-6) * g
        moved = 0.9 * moved + 0.1 * move**2
        x = x - rate * move
    return x


def adafactor(x, decay, rates):
    """Shazeer and Stern 2018, algorithm 4 with its relative steps."""
    rows, columns = np.zeros((len(x), 1)), np.zeros((1, x.shape[1]))
    for t, rate in enumerate(rates, 1):
        g, kept = slope(x), 1 - t**-0.8
        size = max(1e-3, np.sqrt(np.mean(x**2))) * min(rate, 1 / math.sqrt(t))
        rows = kept * rows + (1 - kept) * np.sum(g**2, 1, keepdims=True)
        columns = kept * columns + (1 - kept) * np.sum(g**2, 0, keepdims=True)
        move = g / np.sqrt(rows @ columns / rows.sum())
        move = move / max(1, np.sqrt(np.mean(move**2)))
        x = x * (1 - rate * decay) - size * move
    return x


def lion(x, decay, rates):
    """Chen et al. 2023, program 1."""
    m = np.zeros_like(x)
    for rate in rates:
        g = slope(x)
        x = x - rate * (np.sign(0.9 * m + 0.1 * g) + decay * x)
        m = 0.99 * m + 0.01 * g
    return x


def soap(x, decay, rates):
    """Vyas et al. 2024, algorithm 3: Adam in Shampoo's eigenbasis, which is turned every ten steps.

    As in the authors' code the first gradient makes the basis and no step.
    """
    m, v = np.zeros_like(x), np.zeros_like(x)
    sides, bases = [np.zeros((n, n)) for n in x.shape], [np.eye(n) for n in x.shape]
    for t, rate in enumerate(rates):
        g = slope(x)
        if t:
            left, right = bases
            m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * (left.T @ g @ right) ** 2
            turned = (left.T @ m @ right) / (1 - 0.95**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            x = (x - rate * left @ turned @ right.T) * (1 - rate * decay)
        sides = [0.95 * side + 0.05 * part for side, part in zip(sides, (g @ g.T, g.T @ g), strict=True)]
        if t == 0:
            bases = [np.linalg.eigh(side)[1][:, ::-1] for side in sides]
        elif t % 10 == 0:
            orders = [np.argsort(-np.sum(q * (s @ q), 0)) for s, q in zip(sides, bases, strict=True)]
            v = v[np.ix_(*orders)]
            bases = [np.linalg.qr((s @ q)[:, o])[0] for s, q, o in zip(sides, bases, orders, strict=True)]
    return x


def prodigy(x, decay, rates):
    """Mishchenko and Defazio 2023, algorithm 4; the rate stays out of the divisor ("safeguard warm-up")."""
    first, m, v, s = x, np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    d, r, kept = 1e-6, 0.0, math.sqrt(0.999)
    for rate in rates:
        g = slope(x)
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d**2 * g**2
        r = kept * r + (1 - kept) * rate * d**2 * np.sum(g * (first - x))
        s = kept * s + (1 - kept) * d**2 * g
        step, d = rate * d, max(d, r / np.abs(s).sum())
        x = x * (1 - step * decay) - step * m / (np.sqrt(v) + d * 1e-8)
    return x


def schedule_free(x, decay, rates):
    """Defazio et al. 2024, algorithm 1; decay at the point where the gradient is taken."""
    z, v, weight = x, np.zeros_like(x), 0.0
    for t, rate in enumerate(rates, 1):
        y = 0.1 * z + 0.9 * x
        g = slope(y)
        v = 0.999 * v + 0.001 * g**2
        z = z - rate * (g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * y)
        weight += rate**2
        x = x + rate**2 / weight * (z - x)
    return x


def muon(x, decay, rates):
    """Jordan et al. 2024: Nesterov momentum, made orthogonal by five steps of Newton and Schulz."""
    m = np.zeros_like(x)
    for rate in rates:
        g = slope(x)
        m = 0.95 * m + g
        move = g + 0.95 * m
        move = move / np.linalg.norm(move)
        for _ in range(5):
            square = move @ move.T
            move = 3.4445 * move + (-4.7750 * square + 2.0315 * square @ square) @ move
        x = x * (1 - rate * decay) - rate * math.sqrt(max(1, x.shape[0] / x.shape[1])) * move
    return x


REFERENCES = {
    reference.__name__: reference
    for reference in (
        sgd,
        adam,
        adamw,
        nadam,
        radam,
        adamax,
        rmsprop,
        adagrad,
        adadelta,
        adafactor,
        lion,
        soap,
        prodigy,
        schedule_free,
    )
}


def test_every_optimizer_has_a_reference():
    assert {*REFERENCES, "muon"} == set(NAMES)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_the_papers(name, decay):
    rates = [10 * rate for rate in RATES] + [1.0] * 45 if OPTIMIZERS[name].lr == 1 else RATES
    found = descend(name, decay, rates)
    assert np.abs(found - START).max() > 0.1
    np.testing.assert_allclose(found, REFERENCES[name](START, decay, rates), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_steps_as_its_authors_do_up_to_bfloat16(decay):
    rates = RATES[:5]
    found, exact = descend("muon", decay, rates, use_muon=True), muon(START, decay, rates)
    assert np.abs(found - START).max() > 0.2
    np.testing.assert_allclose(found, exact, atol=0.02 * sum(rates))


def test_soap_is_adam_on_a_vector():
    x = torch.nn.Parameter(torch.from_numpy(START[:, 0].copy()))
    optimizer = build_optimizer("soap", [{"params": [x], "weight_decay": 0.0}], 0.1)
    expected, m, v = START[:, 0], np.zeros(4), np.zeros(4)
    for t in range(6):
        x.grad = 3 * x.detach()
        optimizer.step()
        if t:
            g = 3 * expected
            m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g**2
            expected = expected - 0.1 * (m / (1 - 0.95**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    np.testing.assert_allclose(x.detach().numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_each_descends_and_decays_weights_only(name):
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 3))
    optimizer = make_optimizer(model, list(model.parameters()), pj.Strategy(optimizer=name))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all((decayed[id(p)] > 0) == (p.ndim > 1) for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == OPTIMIZERS[name].lr


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
        epochs=30,
        batch_size=32,
        optimizer=name,
        schedule=None if name == "schedule_free" else "warmup_stable_decay",
    )
    trained = pj.apply(model, recipe, task).model
    with torch.no_grad():
        after = (trained(torch.from_numpy(x[500:])).argmax(1).numpy() == y[500:]).mean()
    assert after > max(before + 0.2, 0.7)
