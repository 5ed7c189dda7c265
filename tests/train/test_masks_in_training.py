"""Masked weights stay zero through training, and the training of the others is as if they were not there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from penjing.backends.torch import BACKEND
from penjing.backends.torch.masks import masks_of, set_masks
from penjing.core.context import Context
from penjing.core.task import Task
from penjing.distillation.logits import Distill, distill_torch
from penjing.repair.batchnorm import ReestimateBatchNorm, reestimate_batchnorm
from penjing.train.finetune import FineTune, fine_tune_torch
from penjing.train.hooks import Hooks
from penjing.train.loop import fit
from penjing.train.objective import make_objective
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


def masked(net, share=0.7):
    model, rng = net(16), np.random.default_rng(0)
    set_masks(
        model, {n: rng.random(tuple(p.shape)) > share for n, p in model.named_parameters() if p.ndim > 1}
    )
    return model


def assert_zeros_are_those_of_the_masks(model, masks):
    assert masks_of(model).keys() == masks.keys()
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach().numpy()
        np.testing.assert_array_equal(weight != 0, mask)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [FineTune, Distill])
def test_zeros_stay_zero(net, split, kind, optimizer):
    model = masked(net)
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    context = Context(task=Task(train=split, batch_size=50), backend=BACKEND, original=net(16))
    handler = {FineTune: fine_tune_torch, Distill: distill_torch}[kind]
    handler(model, kind(epochs=1, optimizer=optimizer), context)
    assert_zeros_are_those_of_the_masks(model, masks)
    assert all(not torch.equal(model.state_dict()[name], before[name]) for name in masks)
    reestimate_batchnorm(model, ReestimateBatchNorm(examples=256), context)
    assert_zeros_are_those_of_the_masks(model, masks)


def test_removed_weights_do_not_count_in_the_norm_that_is_clipped(net, split):
    """The same step as without the columns that the mask removes."""
    whole, narrow = net(8), net(8)
    mask = np.zeros((10, 256), bool)
    mask[:, :40] = True
    set_masks(whole, {"8.weight": mask})
    narrow[8] = torch.nn.Linear(40, 10)
    with torch.no_grad():
        narrow[8].weight.copy_(whole[8].weight[:, :40])
        narrow[8].bias.copy_(whole[8].bias)
    narrow.insert(8, Columns(40))
    for model in (whole, narrow):
        model[7].p = 0.0
    recipe = Strategy(epochs=0.1, batch_size=60, clip_norm=0.1)
    losses = [fit(model, split, LOSS, recipe).losses for model in (whole, narrow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(whole[8].weight[:, :40], narrow[9].weight)
    torch.testing.assert_close(whole[0].weight, narrow[0].weight)


class Columns(torch.nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return x[:, : self.count]


def test_a_fall_back_after_divergence_keeps_zeros_too(net, split):
    model = masked(net)
    masks, broken = masks_of(model), iter([False] * 3 + [True] + [False] * 100)

    def objective(outputs, inputs, targets):
        loss = LOSS(outputs, inputs, targets)
        return loss * float("nan") if next(broken) else loss

    done = fit(model, split, objective, Strategy(epochs=1, batch_size=50))
    assert any("restored" in event for event in done.events)
    assert_zeros_are_those_of_the_masks(model, masks)


def test_hooks_are_called_at_every_step_and_see_gradients(net, split):
    model, seen, norms, said = net(), [], [], []

    def gradients(progress):
        norms.append(float(model[8].weight.grad.norm()))

    fit(
        model,
        split,
        LOSS,
        Strategy(epochs=2, batch_size=100),
        hooks=Hooks(said.append, gradients, seen.append),
    )
    assert seen == pytest.approx(np.arange(12) / 12)
    assert len(norms) == 12
    assert min(norms) > 0
    assert len(said) == 2
