"""The range test: rates rise, the suggestion lies where the loss falls, the machine is probed on copies."""

import numpy as np
import pytest
import torch
from torch import nn

from penjing.core.backend import backend_for
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.train.machine import probe_machine
from penjing.train.objective import make_objective
from penjing.train.range_test import run_range_test, suggest_rate
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


def test_rates_rise_evenly_and_the_suggestion_trains(net, split):
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    strategy = Strategy(batch_size=50)
    found = run_range_test(model, backend_for(model), split, LOSS, strategy, steps=80)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    steps = np.diff(np.log(found.rates))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert found.rates[0] == pytest.approx(0.05 * 1e-3)
    assert 1e-3 < found.suggestion < found.highest < 5
    assert found.losses[found.rates.index(found.highest)] == min(found.losses)


def test_what_a_curve_suggests():
    rates = [10.0**k for k in range(-5, 2)]
    found = suggest_rate(rates, [2.3, 2.3, 2.2, 1.2, 0.8, 0.7, 1.5])
    assert (found.suggestion, found.highest) == (1e-2, 1.0)


def test_a_loss_that_never_falls_is_refused():
    with pytest.raises(Refused, match="the loss must fall"):
        suggest_rate([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    rng = np.random.default_rng(0)
    noise = Split((rng.random((40, 4), np.float32),), np.zeros(40, np.float32), "train")
    model = nn.Linear(4, 1)
    rising = make_objective(Task(train=None, loss=lambda out, y: -1 / (1 + out.square().mean())))
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    with pytest.raises(Refused, match="the loss must fall"):
        run_range_test(model, backend_for(model), noise, rising, Strategy(batch_size=20), steps=10)


def test_the_machine_is_measured_on_copies(net, split):
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = probe_machine(model, backend_for(model), split, LOSS, Strategy(batch_size=50))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {"float32, contiguous", "float32, channels_last"} <= set(found.seconds)
    assert found.chosen == f"{found.strategy.precision}, {found.strategy.layout}"
    assert found.gain >= 1
    assert found.strategy.batch_size == 50
    table = Split((np.zeros((64, 4), np.float32),), np.zeros(64, np.int64), "train")
    flat = probe_machine(nn.Linear(4, 3), backend_for(nn.Linear(4, 3)), table, LOSS, Strategy(batch_size=8))
    assert not any("channels" in name for name in flat.seconds)


def test_a_user_gets_the_rates_and_a_page(net, split, tmp_path):
    import penjing as pj

    x, y = split.inputs[0], split.targets
    task = pj.Task(train=(x[:400], y[:400]), valid=(x[400:500], y[400:500]), test=(x[500:], y[500:]))
    found = pj.range_test(net(), task, pj.Strategy(batch_size=50), steps=60, report=tmp_path / "range.html")
    assert f"{found.suggestion:.3g}" in (tmp_path / "range.html").read_text()
    with pytest.raises(Refused, match="must be a number of 10 to 10,000"):
        pj.range_test(net(), task, steps=3)
