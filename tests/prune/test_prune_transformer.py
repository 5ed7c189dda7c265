"""Transformers lose heads and neurons without training."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
datasets = pytest.importorskip("sklearn.datasets", reason="the extra metrics is not installed")

import penjing as pj  # noqa: E402
from penjing.arrays.scores import consumers  # noqa: E402
from penjing.arrays.structure.mask_search import mask_gradients  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.structure.history import lineage  # noqa: E402
from penjing.core.backend import Sample  # noqa: E402
from penjing.core.context import Context  # noqa: E402
from penjing.core.measurement import Estimate  # noqa: E402
from penjing.core.task import Split, Task  # noqa: E402
from penjing.measurement.quality import accuracy  # noqa: E402

FEW = {"criterion": "masks", "examples": 128, "round_to": 4}


@pytest.fixture(scope="module")
def task():
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.images[order, None] / 16).astype(np.float32), digits.target[order]
    bounds = {"train": slice(0, 1000), "valid": slice(1000, 1300), "test": slice(1300, 1797)}
    return Task(**{name: Split((x[part],), y[part], name) for name, part in bounds.items()})


@pytest.fixture(scope="module")
def trained(tiny_transformer, task):
    recipe = pj.FineTune(epochs=5, optimizer="adamw", lr=3e-3, batch_size=50)
    return pj.apply(tiny_transformer(), recipe, task).model.eval()


def right(model, task):
    inputs, targets = task.test.arrays()
    return accuracy(BACKEND.run(model, inputs), targets)


def prunable(model, task):
    groups = BACKEND.groups(model, task.valid.example())
    return [group for group in groups.groups if group.kind != "hidden"]


def masked(model, groups, mask):
    """A copy whose consumers see the inputs of each unit times its mask."""
    model = copy.deepcopy(model)
    for group in groups:
        for slot in consumers(group):
            factor = torch.from_numpy(mask[group.name][slot.units]).float()
            model.get_submodule(slot.layer).register_forward_pre_hook(lambda _, x, f=factor: (x[0] * f,))
    return model


def loss_of_each(model, inputs, targets):
    with torch.no_grad():
        outputs = model(torch.from_numpy(inputs[0]).double())
        return torch.nn.functional.cross_entropy(outputs, torch.from_numpy(targets), reduction="none").numpy()


def test_gradients_of_masks_are_finite_differences(trained, task):
    groups = prunable(trained, task)
    split = task.train.take(np.arange(6), "train")
    layers = [slot.layer for group in groups for slot in consumers(group)]
    found = mask_gradients(groups, BACKEND.gate_gradients(trained, layers, Sample(split, task.loss, 1, 6, 0)))
    (inputs, targets), step = next(split.batches(6, 0)), 1e-4
    precise = copy.deepcopy(trained).double()
    for group in groups:
        for unit in range(0, group.size, max(1, group.size // 3)):
            losses = []
            for sign in (1, -1):
                mask = {g.name: np.ones(g.size) for g in groups}
                mask[group.name][unit] += sign * step
                moved = masked(precise, groups, mask)
                losses.append(loss_of_each(moved, inputs, targets))
            expected = (losses[0] - losses[1]) / (2 * step)
            np.testing.assert_allclose(
                found[group.name][:, unit], expected, atol=2e-3 * np.abs(found[group.name]).max()
            )


@pytest.fixture(scope="module")
def halved(trained, task):
    return pj.apply(trained, pj.PruneTransformer(0.5, **FEW), task)


@pytest.fixture(scope="module")
def smaller(trained, task):
    return pj.apply(trained, pj.PruneTransformer(0.3, of="parameters", **FEW), task)


def test_the_share_asked_for_is_gone(trained, halved, smaller, task):
    before = BACKEND.operations(trained, task.valid.example())
    for applied, of, ratio in ((halved, "multiply_adds", 0.5), (smaller, "parameters", 0.3)):
        after = BACKEND.operations(applied.model, task.valid.example())
        left = getattr(after, of) / getattr(before, of)
        assert 1 - ratio - 0.03 <= left <= 1 - ratio
        assert f"({ratio:.1%} was to go)" in applied.notes["pruning"][0]


def test_the_cut_model_is_the_masked_one_and_keeps_its_accuracy(trained, smaller, task):
    dense = right(trained, task)
    assert dense > 0.85
    chosen, left = prunable(trained, task), lineage(smaller.model)
    masks = {}
    for group in chosen:
        slot = consumers(group)[0]
        stays = left.get(f"{slot.layer}.weight", {}).get(1, np.arange(len(slot.units)))
        masks[group.name] = np.isin(np.arange(group.size), slot.units[stays]).astype(float)
    assert min(mask.mean() for mask in masks.values()) < 1
    inputs = task.test.arrays()[0]
    gap = np.abs(BACKEND.run(smaller.model, inputs) - BACKEND.run(masked(trained, chosen, masks), inputs))
    assert gap.max() < 1e-4
    assert right(smaller.model, task) > dense - 0.08


def test_fisher_information_beats_chance_and_least_squares_helps(trained, halved, task):
    chance = pj.PruneChannels(0.5, of="multiply_adds", score="random", round_to=4)
    found = [right(pj.apply(trained, chance, task).model, task), right(halved.model, task)]
    repair = pj.LeastSquares(examples=512)
    context = Context(task=task, backend=BACKEND, original=trained)
    found.append(right(pj.apply(halved.model, repair, task, context=context).model, task))
    assert found[0] < found[1] < found[2]


def test_refitting_tells_that_one_neuron_makes_up_for_another(trained, task):
    model = copy.deepcopy(trained)
    up, down = model.body[0].up, model.body[0].down
    with torch.no_grad():
        down.weight.mul_(3)
        for tensor in (up.weight, up.bias):
            tensor[1] = tensor[0]
        down.weight[:, 1] = down.weight[:, 0]
    own = {"criterion": "refit", "examples": 256, "round_to": 1}
    few = pj.only("body.0.up", pj.PruneTransformer(0.005, **own))
    cut = pj.apply(model, few, task).model
    stays = lineage(cut)["body.0.up.weight"][0]
    assert len(stays) < len(up.weight)
    assert (0 in stays) != (1 in stays)


def test_what_refitting_removes_least_squares_makes_up_for(trained, task):
    found, by_refit = {}, pj.PruneTransformer(0.6, examples=128, round_to=4)
    chance = pj.PruneChannels(0.6, of="multiply_adds", score="random", round_to=4)
    for name, cut in {"refit": by_refit, "chance": chance}.items():
        small = pj.apply(trained, cut, task).model
        context = Context(task=task, backend=BACKEND, original=trained)
        repaired = pj.apply(small, pj.LeastSquares(examples=1000), task, context=context).model
        found[name] = right(repaired, task)
    assert found["refit"] > max(found["chance"], right(trained, task) - 0.1)


def test_latency_is_what_the_clock_says(trained, task, monkeypatch):
    """A clock on which narrow layers gain little, and that heads hardly move."""
    timed = []

    @contextmanager
    def beside(reference, target, split):
        def ratio_of(model):
            heads, neurons = (
                sum(getattr(layer, name).weight.shape[0] for layer in model.body) / whole
                for name, whole in (("query", 64), ("up", 128))
            )
            timed.append((heads, neurons))
            value = 0.2 + 0.1 * heads + 0.7 * max(neurons, 0.25) ** 0.8
            return Estimate(value=value, low=value, high=value, n=15)

        yield ratio_of

    monkeypatch.setattr("penjing.measurement.cost.beside", beside)
    applied = pj.apply(trained, pj.PruneTransformer(0.25, of="latency", **FEW), task)
    heads, neurons = timed[-1]
    assert heads > neurons, "heads save little time here"
    assert 0.72 <= 0.2 + 0.1 * heads + 0.7 * neurons**0.8 <= 0.76
    assert "of the latency on onnxruntime" in applied.notes["pruning"][0]


def test_without_labels(trained, task):
    shuffled = Split(task.train.inputs, np.roll(task.train.targets, 7), "train")
    blind = Task(train=shuffled, valid=task.valid, test=task.test)
    method = pj.PruneTransformer(0.3, labels=False, **FEW)
    first, second = (pj.apply(trained, method, t).model for t in (task, blind))
    inputs = task.test.arrays()[0]
    np.testing.assert_array_equal(BACKEND.run(first, inputs), BACKEND.run(second, inputs))
    assert right(first, task) > right(trained, task) - 0.1


def test_every_layer_is_reported_with_its_reason(trained, smaller, task):
    method = pj.only("body.0.*", pj.PruneTransformer(0.05, **FEW))
    changes = {c.layer: c for c in pj.apply(trained, method, task).changes}
    assert any(c.done for name, c in changes.items() if name.startswith("body.0."))
    assert not any(c.done for name, c in changes.items() if not name.startswith("body.0."))
    changes = {c.layer: c for c in smaller.changes}
    assert changes["fc"].status == "skipped"
    assert "output" in changes["fc"].reason
    assert all(c.reason for c in changes.values() if not c.done and c.layer not in ("body.0.project",))


def refusal(model, method, task):
    with pytest.raises(pj.Refused) as caught:
        pj.apply(model, method, task)
    return str(caught.value)


def test_what_cannot_be_done_is_refused(trained, task):
    words = refusal(trained, pj.PruneTransformer(0.99, **FEW), task)
    assert "must be at most about 0." in words
    assert "the share of the multiply-adds that can go, got 0.99. Ask for 0." in words
    few = Task(train=task.train.take(np.arange(31), "train"), valid=task.valid, test=task.test)
    assert "task.train must have at least 32 examples to judge units by, got 31" in refusal(
        trained, pj.PruneTransformer(0.3, **FEW), few
    )
    infinite = Task(
        train=task.train,
        valid=task.valid,
        test=task.test,
        loss=lambda outputs, targets: (outputs * torch.inf).mean(),
    )
    assert "the loss on task.train must have finite gradients" in refusal(
        trained, pj.PruneTransformer(0.3, **FEW), infinite
    )


def test_a_network_without_heads_or_neurons_says_why_nothing_goes(task):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)
    )
    assert "neither attention heads nor neurons" in refusal(net, pj.PruneTransformer(0.3, **FEW), task)
