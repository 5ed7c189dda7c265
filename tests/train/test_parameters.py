"""Groups of parameters, and BatchNorm's modes while a model trains."""

import pytest
import torch
from torch import nn

from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.train.loop import fit
from penjing.train.objective import make_objective
from penjing.train.parameters import BatchNormMode, keep_statistics, make_optimizer, set_training_mode
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


class Encoder(nn.Module):
    """Embedding, three numbered blocks, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3))
        self.head = nn.Linear(8, 2)


def rates(model, **fields):
    strategy = Strategy(**fields)
    groups = make_optimizer(model, list(model.parameters()), strategy).param_groups
    by_tensor = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {name: by_tensor[id(p)] for name, p in model.named_parameters()}


def test_each_block_trains_at_a_share_of_the_next_ones_rate():
    found = {name: group["lr"] for name, group in rates(Encoder(), layer_decay=0.5, lr=1.0).items()}
    assert found["head.weight"] == found["head.bias"] == 1.0
    assert [found[f"layers.{i}.0.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found["layers.0.1.bias"] == 0.125
    assert found["embed.weight"] == 0.0625


def test_without_layer_decay_there_are_two_groups():
    assert len({id(group) for group in rates(Encoder()).values()}) == 2


def test_muon_steps_on_hidden_matrices_only():
    pytest.importorskip("pytorch_optimizer", reason="the extra optimizers is not installed")
    found = rates(Encoder(), optimizer="muon")
    hidden = {name for name, group in found.items() if group["use_muon"]}
    assert hidden == {f"layers.{i}.0.weight" for i in range(3)}
    assert found["head.weight"]["lr"] == pytest.approx(0.15 * found["layers.1.0.weight"]["lr"])


def test_muon_leaves_the_first_and_the_last_matrix_also_where_they_are_one():
    pytest.importorskip("pytorch_optimizer", reason="the extra optimizers is not installed")
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[3].weight = model[0].weight
    hidden = {name for name, group in rates(model, optimizer="muon").items() if group["use_muon"]}
    assert hidden == {"1.weight", "2.weight"}


def test_prodigy_refuses_rates_by_layer():
    pytest.importorskip("pytorch_optimizer", reason="the extra optimizers is not installed")
    with pytest.raises(Refused, match="layer_decay cannot be combined with prodigy"):
        rates(Encoder(), optimizer="prodigy", layer_decay=0.8)


def test_ghost_batches_are_normalized_apart():
    layer = nn.BatchNorm1d(3)
    torch.manual_seed(0)
    x = torch.randn(32, 3) * 3 + 1
    with set_training_mode(layer, lambda name: True, BatchNormMode(ghost=8)):
        parts = layer(x).split(8)
    for part in parts:
        torch.testing.assert_close(part.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    assert "forward" not in vars(layer)


def test_frozen_batchnorm_keeps_statistics_and_scales_while_the_rest_trains(net, split):
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fit(model, split, LOSS, Strategy(epochs=1, batch_size=50, batchnorm="frozen"))
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"0.weight", "0.bias", "3.weight", "3.bias", "8.weight", "8.bias"}


def test_statistics_stay_in_a_pass_that_does_not_count():
    layer = nn.BatchNorm1d(3)
    with keep_statistics(layer):
        layer(torch.randn(8, 3) + 5)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.momentum == 0.1


def test_parts_add_up_to_the_batch():
    """Without BatchNorm and dropout a batch in micro-batches gives the same weights."""
    torch.manual_seed(0)
    x, y = torch.randn(96, 6).numpy(), torch.randint(0, 3, (96,)).numpy()
    from penjing.core.task import Split

    weights = []
    for steps in (1, 4):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        fit(model, Split((x,), y, "train"), LOSS, Strategy(epochs=3, batch_size=32, accumulation_steps=steps))
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_sharpness_aware_steps_take_the_gradient_uphill():
    """One step on w^2/2 of one weight: the gradient is taken at w + rho."""
    import numpy as np

    from penjing.core.task import Split

    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    loss = make_objective(Task(train=None, loss=lambda out, target: (out**2 / 2).mean()))
    one = Split((np.ones((1, 1), np.float32),), np.zeros(1, np.float32), "train")
    plain = Strategy(epochs=1, batch_size=1, lr=0.1, weight_decay=0, warmup=0, schedule="constant")
    fit(model, one, loss, plain.model_copy(update={"sam": 0.5, "clip_norm": None}))
    # Nesterov's first step is 1.9 times the gradient.
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * 1.9 * 2.5, abs=1e-5)
