"""Averages of weights against averages taken by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from penjing.core.task import Task
from penjing.train.averaging import WeightAverage
from penjing.train.hooks import CONTINUE, Hooks
from penjing.train.loop import fit
from penjing.train.objective import make_objective
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


def walked(kind, steps=200):
    """Return an average and the path of a single weight."""
    model = nn.Linear(1, 1, bias=False)
    average, path = WeightAverage(model, kind, None, False), []
    rng = np.random.default_rng(0)
    for step in range(steps):
        with torch.no_grad():
            model.weight.fill_(float(rng.normal()))
        path.append(model.weight.item())
        average.update(step + 1, steps)
    with average.applied():
        shown = model.weight.item()
    assert model.weight.item() == path[-1], "what was shown is put back"
    average.copy_to_model()
    assert model.weight.item() == shown
    return shown, np.array(path)


def test_swa_is_the_mean_of_the_points_of_the_last_quarter():
    shown, path = walked("swa")
    assert shown == pytest.approx(path[[*range(151, 200, 4)]].mean(), abs=1e-6)


def test_latest_is_the_mean_of_the_last_five_points():
    shown, path = walked("latest")
    assert shown == pytest.approx(path[[183, 187, 191, 195, 199]].mean(), abs=1e-6)


def test_ema_forgets_the_beginning():
    shown, path = walked("ema")
    mean = path[0]
    for step, value in enumerate(path[1:], 2):
        mean += (value - mean) / min(10.0, (10 + step) / 9)
    assert shown == pytest.approx(mean, abs=1e-5)


def test_an_average_begins_anew_after_weights_went_back():
    model = nn.Linear(1, 1)
    average = WeightAverage(model, "ema", None, False)
    average.update(1, 10)
    assert average.differs
    average.reset()
    assert not average.differs


@pytest.mark.parametrize("kind", ["ema", "swa", "latest"])
def test_training_keeps_the_average_and_statistics_that_fit_it(net, split, digits, kind):
    plain, averaged = net(), net()
    fit(plain, split, LOSS, Strategy(epochs=2, batch_size=50, schedule="constant"))
    strategy = Strategy(epochs=2, batch_size=50, averaging=kind, schedule="constant")
    done = fit(averaged, split, LOSS, strategy)
    assert any("estimated for the averaged weights" in event for event in done.events)
    x = torch.from_numpy(split.inputs[0])
    seen = []
    averaged.eval()
    averaged[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    averaged(x)
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), averaged[1].running_mean, rtol=1e-3, atol=1e-4)
    right = (averaged(torch.from_numpy(digits[0][600:900])).argmax(1).numpy() == digits[1][600:900]).mean()
    assert right > 0.85
    assert not torch.equal(plain[0].weight, averaged[0].weight)


def test_the_caller_sees_the_average_and_training_goes_on_from_its_own_weights(net, split):
    """A look must not change what comes after it."""
    runs = []
    for looks in (False, True):
        model, seen = net(), []

        def look(progress, model=model, seen=seen):
            before = model[0].weight.clone()
            with progress.evaluated_weights():
                seen.append(not torch.equal(before, model[0].weight))
            return CONTINUE

        strategy = Strategy(epochs=2, batch_size=50, averaging="ema")
        fit(
            model,
            split,
            LOSS,
            strategy,
            hooks=Hooks(evaluate=look, evaluate_every=0.25) if looks else Hooks(),
        )
        runs.append(model.state_dict())
        assert len(seen) == (8 if looks else 0)
        assert all(seen)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_normalization_that_is_frozen_keeps_its_statistics_under_an_average(net, split):
    model = net()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    before = model[1].running_mean.clone()
    fit(model, split, LOSS, Strategy(epochs=1, batch_size=50, averaging="ema"))
    assert torch.equal(model[1].running_mean, before)
    assert not torch.equal(model[4].running_mean, torch.zeros(16))
