"""Zeros that come while a network trains: ramps, criteria, rewinding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from penjing.arrays.sparsity.patterns import pattern_of
from penjing.arrays.sparsity.ramp import ramp_at, round_sparsity
from penjing.arrays.sparsity.weights import weight_masks
from penjing.backends.torch import BACKEND
from penjing.backends.torch.masks import masks_of
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.prune.gradual import PruneGradually, prune_gradually
from penjing.train.hooks import Hooks
from penjing.train.loop import fit
from penjing.train.objective import make_objective
from penjing.train.sparsify import MaskChoice, Sparsifier


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    parts = {"train": slice(0, 800), "valid": slice(800, 1200)}
    return Task(batch_size=40, **{n: Split((x[part],), y[part], n) for n, part in parts.items()})


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def trained_net(task):
    model = net()
    from penjing.train.finetune import FineTune, fine_tune_torch

    fine_tune_torch(model, FineTune(epochs=4, batch_size=40), Context(task, BACKEND, model))
    return model.eval()


def pruned(model, task, method, **fields):
    small = copy.deepcopy(model)
    outcome = prune_gradually(small, method, Context(task, BACKEND, model, **fields))
    return outcome.model, {c.layer: c for c in outcome.changes}


def accuracy(model, task):
    (x,), y = task.valid.arrays()
    return float((BACKEND.run(model, (x,)).argmax(1) == y).mean())


def weights(model):
    return {n: p.detach().numpy() for n, p in model.named_parameters() if p.ndim > 1}


def sparsity_of(model):
    arrays = weights(model).values()
    return sum(int((a == 0).sum()) for a in arrays) / sum(a.size for a in arrays)


def test_the_cubic_ramp_is_the_formula_and_ends_where_it_should():
    t = np.linspace(0, 1, 101)
    found = [ramp_at("cubic", p, 0.2, 0.7, 0.9) for p in t]
    x = np.clip((t - 0.2) / 0.5, 0, 1)
    np.testing.assert_allclose(found, 0.9 + (0 - 0.9) * (1 - x) ** 3, atol=1e-12)
    assert [ramp_at("constant", p, 0.2, 0.7, 0.9) for p in (0.1, 0.2, 1.0)] == [0.0, 0.9, 0.9]
    kept = np.diff([0, *(round_sparsity(n, 4, 0.8) for n in range(1, 5))])
    np.testing.assert_allclose(kept[1:] / kept[:-1], 0.2**0.25)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x4"])
def test_masks_of_weights_have_their_shapes_and_counts(pattern, scope):
    rng = np.random.default_rng(0)
    scores = {"conv": rng.random((8, 4, 3, 3)) + 1, "linear": rng.random((6, 8))}
    masks = weight_masks(scores, 0.5, pattern_of(pattern), scope, floor=0.1)
    assert {n: m.shape for n, m in masks.items()} == {n: s.shape for n, s in scores.items()}
    assert sum(int((~m).sum()) for m in masks.values()) == pytest.approx(336 / 2, abs=8)
    if pattern == "2:4":
        np.testing.assert_array_equal(masks["conv"].reshape(8, 1, 4, 9).sum(2), 2)
        np.testing.assert_array_equal(masks["linear"].reshape(6, 2, 4).sum(2), 2)
    if scope == "global" and pattern != "2:4":
        assert masks["linear"].sum() < 12 < masks["conv"].sum() / 3


@pytest.mark.parametrize(
    "method",
    [
        PruneGradually(0.8, epochs=3),
        PruneGradually(0.8, epochs=3, criterion="movement", scope="layer", begin=0.1),
        PruneGradually(0.8, epochs=3, ramp="constant", begin=0.1),
        PruneGradually(0.8, epochs=3, ramp="one_shot", alpha=0.9),
        PruneGradually(0.8, epochs=1, ramp="one_shot", rewind="rate", rounds=3),
        PruneGradually(0.8, epochs=1, ramp="one_shot", rewind="weights", rounds=2, begin=0.2),
        PruneGradually(0.5, pattern="block:2x4", epochs=1, optimizer="adamw"),
    ],
    ids=lambda m: f"{m.ramp}-{m.criterion}-{m.rewind}-{m.pattern}",
)
def test_the_share_of_zeros_is_the_wanted_one_and_quality_holds(trained_net, task, method):
    small, changes = pruned(trained_net, task, method)
    assert sparsity_of(small) == pytest.approx(method.share, abs=0.005)
    assert accuracy(small, task) > accuracy(trained_net, task) - 0.06
    for name, mask in masks_of(small).items():
        np.testing.assert_array_equal(weights(small)[name] != 0, mask)
        assert changes[name.removesuffix(".weight")].detail["sparsity"] == pytest.approx(
            1 - mask.mean(), abs=1e-6
        )
    runs = method.rounds + (method.rewind == "weights")
    assert changes["*"].detail["runs"] == runs
    assert changes["*"].detail["steps"] == 20 * method.epochs * runs


def test_training_with_zeros_beats_zeros_alone(trained_net, task):
    small, _ = pruned(trained_net, task, PruneGradually(0.95, epochs=3))
    bare, magnitudes = copy.deepcopy(trained_net), weights(trained_net)
    masks = weight_masks(
        {n: a**2 for n, a in magnitudes.items()}, 0.95, pattern_of("unstructured"), "global", 0.02
    )
    BACKEND.set_masks(bare, masks)
    assert sparsity_of(bare) == pytest.approx(sparsity_of(small), abs=0.002)
    assert accuracy(small, task) > accuracy(bare, task) + 0.1


def test_the_same_seed_gives_the_same_zeros(trained_net, task):
    method = PruneGradually(0.7, epochs=0.5)
    models = [pruned(trained_net, task, method, seed=seed)[0] for seed in (1, 1, 2)]
    prints = [BACKEND.fingerprint(model) for model in models]
    assert prints[0] == prints[1] != prints[2]


def watched(model, task, choice, schedule, moments, after):
    """Train with a sparsifier and look at the model after every step."""
    sparsifier = Sparsifier(model, ["4.weight"], choice, schedule, moments)

    def after_step(progress):
        sparsifier.after_step(progress)
        after(progress)

    recipe = PruneGradually(0.5, epochs=2, batch_size=40, lr=0.1)
    fit(
        model,
        task.train,
        make_objective(task),
        recipe.strategy,
        hooks=Hooks(after_backward=sparsifier.after_backward, after_step=after_step),
    )
    return sparsifier


def test_masks_change_between_begin_and_end_only_and_weights_can_come_back(trained_net, task):
    model, masks = copy.deepcopy(trained_net), {}
    choice = MaskChoice("magnitude", pattern_of("unstructured"), "global", 0.0)
    moments = [0.2 + 0.05 * i for i in range(9)]
    watched(
        model,
        task,
        choice,
        lambda p: ramp_at("constant", p, 0.2, 0.6, 0.5),
        moments,
        lambda p: masks.update({p: masks_of(model).get("4.weight")}),
    )
    shares = {p: 0.0 if m is None else 1 - m.mean() for p, m in masks.items()}
    assert all(share == (0.0 if p < 0.2 else pytest.approx(0.5, abs=1e-3)) for p, share in shares.items())
    early, late = (next(m for p, m in masks.items() if p >= at) for at in (0.2, 0.62))
    assert (late & ~early).any()
    assert all(np.array_equal(m, late) for p, m in masks.items() if p >= 0.62)


def test_movement_scores_are_the_sum_of_minus_weight_times_gradient(trained_net, task):
    model, expected = copy.deepcopy(trained_net), [0.0]
    choice = MaskChoice("movement", pattern_of("unstructured"), "layer", 0.0)
    sparsifier = Sparsifier(model, ["4.weight"], choice, lambda p: 0.0, [])

    def after_backward(progress):
        expected[0] = expected[0] - (model[4].weight.grad * model[4].weight).detach()
        sparsifier.after_backward(progress)

    recipe = PruneGradually(0.5, epochs=0.2, batch_size=40)
    fit(
        model,
        task.train,
        make_objective(task),
        recipe.strategy,
        hooks=Hooks(after_backward=after_backward, after_step=sparsifier.after_step),
    )
    sparsifier.mask(0.75)
    order = np.argsort(expected[0].numpy().ravel())
    kept = masks_of(model)["4.weight"].ravel()[order]
    assert not kept[: len(kept) * 3 // 4].any()
    assert kept[len(kept) * 3 // 4 :].all()


def test_rewound_weights_are_those_of_the_first_run(trained_net, task):
    """With a rate of almost nothing in the last run, what is left is what was there early."""
    start = net(3)
    method = PruneGradually(0.6, epochs=1, ramp="one_shot", rewind="weights", lr=1e-9, begin=0.0)
    small, _ = pruned(start, task, method)
    for name, array in weights(small).items():
        kept = array != 0
        np.testing.assert_allclose(array[kept], weights(start)[name][kept], atol=1e-6)


def test_layers_that_are_not_covered_stay_dense(trained_net, task):
    small, changes = pruned(
        trained_net, task, PruneGradually(0.5, epochs=0.3), covers=lambda name: name == "4"
    )
    assert set(changes) == {"*", "4"}
    assert sparsity_of(small) == pytest.approx(0.5 * 8192 / (8192 + 72 + 640), abs=0.001)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0},
        {"end": 0.2, "begin": 0.5},
        {"begin": 0.7},
        {"criterion": "movement", "ramp": "one_shot"},
        {"rewind": "rate"},
        {"rounds": 2},
        {"pattern": "4:2"},
    ],
)
def test_values_that_do_not_go_together_are_refused_by_name(wrong):
    name = next(iter(wrong))
    with pytest.raises(Refused, match=name):
        PruneGradually(**{"sparsity": 0.5, **wrong})
