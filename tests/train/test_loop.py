from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from torch import nn

from penjing.core.errors import Exit, Refused
from penjing.core.task import Split, Task
from penjing.train.hooks import Hooks
from penjing.train.loop import RESERVE, fit, fit_steps
from penjing.train.objective import make_objective
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def part(split, count):
    return Split((split.inputs[0][:count],), split.targets[:count], "train")


def test_loss_falls_and_accuracy_rises(net, split, digits):
    model, said = net(), []
    done = fit(
        model,
        split,
        LOSS,
        Strategy(epochs=3, batch_size=50),
        hooks=Hooks(log=lambda line: said.append(str(line))),
    )
    x, y = digits
    right = (model.eval()(torch.from_numpy(x[600:900])).argmax(1).numpy() == y[600:900]).mean()
    assert right > 0.85
    assert done.losses[-1] < 0.3 * done.losses[0]
    assert (done.steps, done.planned_steps, done.examples) == (36, 36, 1800)
    assert len(said) == len(done.losses) == 3
    assert 0 <= done.data_seconds < done.seconds
    assert done.samples_per_s > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["linear", "one_cycle"])
def test_same_seed_same_weights_and_the_callers_random_state_stays(net, split, optimizer, schedule):
    recipe = Strategy(epochs=0.5, optimizer=optimizer, schedule=schedule, batch_size=50)
    state = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        model = net()
        assert fit(model, split, LOSS, recipe, seed=seed).steps == 6
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())


def test_modes_and_flags_and_layout_are_put_back(net, split):
    model = net(16)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    frozen = model[0].weight.clone()
    fit(model, part(split, 100), LOSS, Strategy(epochs=1), covers=lambda layer: layer != "3")
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert torch.equal(model[0].weight, frozen)
    assert all(p.is_contiguous() for p in model.parameters())


def test_layers_that_are_not_covered_stay_and_so_do_their_statistics(net, split):
    model = net()
    before = weights(model)
    fit(model, part(split, 100), LOSS, Strategy(epochs=1, batch_size=50), covers=lambda layer: layer == "8")
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"8.weight", "8.bias"}


def test_all_frozen_is_refused_and_modes_are_back(net, split):
    model = net().requires_grad_(False).eval()
    with pytest.raises(Refused, match="needs at least one parameter"):
        fit(model, split, LOSS, Strategy())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_a_last_batch_of_one_joins_the_one_before(split):
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))

    def objective(outputs, inputs, targets):
        seen.append(len(targets))
        return LOSS(outputs, inputs, targets)

    done = fit(model, part(split, 9), objective, Strategy(epochs=2, batch_size=4))
    assert seen == [4, 5, 4, 5]
    assert done.steps == done.planned_steps == 4
    assert [event for event in done.events if "last batch of one" in event]


def test_batches_of_one_keep_the_statistics(split):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    mean = model[2].running_mean.clone()
    done = fit(model, part(split, 3), LOSS, Strategy(epochs=1, batch_size=1))
    assert done.steps == 3
    assert torch.equal(mean, model[2].running_mean)
    assert [event for event in done.events if "keeps its statistics" in event]


class Poisoned(Split):
    """Gives NaN images in the batches numbered in `bad`, counted over all epochs."""

    def __init__(self, split, bad):
        super().__init__(split.inputs, split.targets, "train")
        self._bad, self._count = bad, itertools.count()

    def batches(self, size, seed=None):
        for (x,), y in super().batches(size, seed):
            yield (np.full_like(x, np.nan) if next(self._count) in self._bad else x,), y


@pytest.mark.parametrize("bad", [0, 5])
def test_one_nan_batch_rolls_back_and_goes_on_at_a_lower_rate(net, split, bad):
    model = net()
    done = fit(model, Poisoned(split, {bad}), LOSS, Strategy(epochs=1, batch_size=50))
    assert done.steps == 12
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    (event,) = [event for event in done.events if "restored" in event]
    assert event.startswith(f"step {bad + 1}: loss nan")
    assert "the batch itself holds NaN" in event
    assert "divided by 10" in event


def test_a_second_nan_is_refused_with_its_step_and_weights_are_the_last_finite(net, split):
    model = net()
    before = weights(model)
    with pytest.raises(Refused, match="at step 4") as caught:
        fit(model, Poisoned(split, {1, 3}), LOSS, Strategy(epochs=1, batch_size=50))
    assert "the loss must stay finite" in caught.value.rule
    assert same(before, weights(model))


def test_a_huge_rate_is_not_hidden(net, split):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    before = weights(model)
    with pytest.raises(Refused, match="Lower lr"):
        fit(model, split, LOSS, Strategy(lr=1e20, epochs=3, batch_size=50))
    assert same(before, weights(model))


def test_weights_broken_by_the_last_step_fall_back(split):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = weights(model)
    recipe = Strategy(lr=1e38, clip_norm=None, weight_decay=0.99, epochs=0.01, batch_size=50)
    model[1].weight.register_hook(lambda gradient: torch.full_like(gradient, 1e3))
    done = fit(model, split, LOSS, recipe)
    assert done.steps == 1
    assert [event for event in done.events if "not finite" in event]
    assert same(before, weights(model))


def test_out_of_memory_halves_the_batch_and_the_mean_stays(split):
    def run(limit):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with torch.no_grad():
            model[1].weight.fill_(0.01)
            model[1].bias.zero_()
        sizes = []

        def objective(outputs, inputs, targets):
            sizes.append(len(targets))
            if len(targets) > limit:
                raise torch.OutOfMemoryError("stub")
            return LOSS(outputs, inputs, targets)

        done = fit(model, part(split, 100), objective, Strategy(epochs=1, batch_size=50))
        return model, done, sizes

    whole, _, _ = run(50)
    parts, done, sizes = run(20)
    assert sizes == [50, 25, 13, 13, 12, 12, 13, 13, 12, 12]
    assert torch.allclose(whole[1].weight, parts[1].weight, atol=1e-6)
    assert [event for event in done.events if "micro-batches of 13" in event]
    with pytest.raises(Refused, match="must fit in memory") as caught:
        run(3)
    assert caught.value.code == Exit.ENVIRONMENT


def test_another_runtime_error_passes_through(split):
    with pytest.raises(RuntimeError, match="shapes"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), split, LOSS, Strategy())


class Slow(Split):
    """Takes 20 ms for each batch."""

    def batches(self, size, seed=None):
        for batch in super().batches(size, seed):
            time.sleep(0.02)
            yield batch


def test_a_limit_in_seconds_shortens_the_schedule_and_says_so(split):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    slow = Slow(split.inputs, split.targets, "train")
    done = fit(model, slow, LOSS, Strategy(epochs=100, batch_size=50, max_seconds=0.6))
    assert 5 <= done.steps < done.planned_steps == 1200
    assert done.data_seconds > 0.02 * done.steps
    assert [event for event in done.events if f"0.6 s allow {done.steps} of 1200 steps" in event]


def test_a_limit_that_does_not_bite_changes_nothing(split):
    runs = []
    for limit in (None, 1e6):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(True)
        nn.init.constant_(model[1].weight, 0.01)
        nn.init.zeros_(model[1].bias)
        done = fit(model, split, LOSS, Strategy(epochs=1, batch_size=50, max_seconds=limit))
        assert done.steps == done.planned_steps
        runs.append(weights(model))
    assert same(*runs)


def test_steps_within():
    assert fit_steps(100, 10, 1.0, 90.0) == 100
    assert fit_steps(100, 10, 1.0, 50.0) == 10 + int(RESERVE * 50)
    assert fit_steps(100, 10, 1.0, -5.0) == 10


def test_an_empty_split_is_refused(net):
    empty = Split((np.zeros((0, 1, 8, 8), np.float32),), np.zeros(0, np.int64), "train")
    with pytest.raises(Refused, match="needs at least one example"):
        fit(net(), empty, LOSS, Strategy())
