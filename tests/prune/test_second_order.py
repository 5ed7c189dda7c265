"""PruneSecondOrder and PruneKFAC: zeros shared out over the network by what they cost at its outputs."""

from __future__ import annotations

import copy

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.backends.torch.masks import masks_of
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.train.finetune import FineTune, fine_tune_torch


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    parts = {"train": slice(0, 900), "valid": slice(900, 1500)}
    return Task(batch_size=40, **{n: Split((x[part],), y[part], n) for n, part in parts.items()})


@pytest.fixture(scope="module")
def net(task):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    fine_tune_torch(model, FineTune(epochs=4, batch_size=40), Context(task, BACKEND, model))
    return model.eval()


def accuracy(model, task):
    (x,), y = task.valid.arrays()
    return float((BACKEND.run(model, (x,)).argmax(1) == y).mean())


def sparsity_of(model):
    weights = [p.detach().numpy() for p in model.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)


@pytest.mark.parametrize(
    "method",
    [
        pj.PruneSecondOrder(0.85, examples=256, stages=4),
        pj.PruneSecondOrder(0.85, examples=256, stages=1),
        pj.PruneKFAC(0.85, examples=600),
        pj.PruneKFAC(0.85, examples=600, sequential=False, compensate=False),
    ],
    ids=repr,
)
def test_less_is_lost_than_by_magnitude(net, task, method):
    small = pj.apply(net, method, task)
    plain = pj.apply(net, pj.PruneMagnitude(0.85), task)
    assert sparsity_of(small.model) == pytest.approx(0.85, abs=0.003)
    assert accuracy(small.model, task) > accuracy(plain.model, task) + 0.02
    masks = masks_of(small.model)
    for change in small.changes:
        assert change.done
        assert change.detail["sparsity"] == pytest.approx(
            1 - masks[f"{change.layer}.weight"].mean(), abs=1e-6
        )


def test_stages_correct_what_the_stages_before_them_lost(net, task):
    """Back to the original's outputs from weights that are off, with next to nothing removed."""
    wrong = copy.deepcopy(net)
    with torch.no_grad():
        wrong[6].weight *= 0.7
    method = pj.PruneSecondOrder(0.01, examples=512, stages=3, ridge=1e-3)
    context = Context(task, BACKEND, net)
    from penjing.prune.second_order import prune_second_order

    (x,), _ = task.valid.arrays()
    wanted = BACKEND.run(net, (x,))
    before = np.square(BACKEND.run(wrong, (x,)) - wanted).mean()
    after = np.square(BACKEND.run(prune_second_order(wrong, method, context).model, (x,)) - wanted).mean()
    assert after < 0.2 * before


@pytest.mark.parametrize("pattern", ["2:4", "block:2x4"])
def test_patterns_hold_in_the_layers_that_they_fit(net, task, pattern):
    wanted = {} if pattern == "2:4" else {"sparsity": 0.5}
    result = pj.apply(net, pj.PruneSecondOrder(pattern=pattern, examples=64, stages=2, **wanted), task)
    skipped = {c.layer: c.reason for c in result.changes if not c.done}
    assert set(skipped) == {"0"} if pattern == "2:4" else {"0", "8"} >= set(skipped)
    mask = masks_of(result.model)["6.weight"]
    if pattern == "2:4":
        np.testing.assert_array_equal(mask.reshape(32, 64, 4).sum(2), 2)
    else:
        blocks = mask.reshape(16, 2, 64, 4).transpose(0, 2, 1, 3).reshape(16, 64, 8)
        assert set(blocks.sum(2).ravel()) <= {0, 8}


def test_a_network_sparse_in_part_goes_on_from_there(net, task):
    plan = pj.chain(pj.PruneKFAC(0.5), pj.PruneKFAC(0.8))
    result = pj.apply(net, plan, task)
    assert sparsity_of(result.model) == pytest.approx(0.8, abs=0.003)


def test_gradients_that_do_not_fit_are_refused_with_the_numbers(net, task, monkeypatch):
    class Little:
        available = 2**20

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    with pytest.raises(
        Refused,
        match=r"must be so few that gradients fit into half of.*got 512, which take .* GiB for \d+ weights",
    ):
        pj.apply(net, pj.PruneSecondOrder(0.5), task)


def test_layers_without_gradients_by_example_are_skipped_with_the_reason(task):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear, self.idle = nn.Conv3d(1, 4, 1), nn.Linear(256, 10), nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(self.conv(x[:, :, None]).relu().flatten(1))

    changes = {
        c.layer: c for c in pj.apply(Flat(), pj.PruneSecondOrder(0.5, examples=32, stages=1), task).changes
    }
    assert "known for linear" in changes["conv"].reason
    assert changes["linear"].done
    assert not changes["idle"].done
