from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.core.task import Task
from penjing.train.loop import fit
from penjing.train.numerics import numerics_for
from penjing.train.objective import make_objective
from penjing.train.strategy import Strategy

CAN = {"avx512_bf16": True}


@pytest.fixture
def able(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: CAN, raising=False)


CASES = [
    (nn.Conv2d(3, 16, 3), True, True),
    (nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 20, 3)), True, False),
    (nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=12)), False, True),
    (nn.Conv1d(8, 16, 3), True, False),
    (nn.Linear(8, 8), False, False),
    (nn.Linear(1024, 1024), True, False),
    (nn.Conv2d(3, 16, 3).double(), False, True),
]


@pytest.mark.parametrize(("model", "bfloat16", "channels_last"), CASES)
def test_rules(able, model, bfloat16, channels_last):
    chosen = numerics_for(model, "auto")
    assert (chosen.bfloat16, chosen.channels_last) == (bfloat16, channels_last)


def test_a_processor_without_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert not numerics_for(nn.Conv2d(3, 16, 3), "auto").bfloat16
    assert numerics_for(nn.Conv2d(3, 16, 3), "bfloat16").bfloat16


def test_float32_on_request(able):
    chosen = numerics_for(nn.Conv2d(3, 16, 3), "float32")
    assert not chosen.bfloat16
    assert str(chosen) == "float32, channels last"


def test_bfloat16_trains_as_well_and_says_so(net, split):
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = net(16)
        recipe = Strategy(epochs=3, batch_size=50, precision=precision)
        done = fit(model, split, make_objective(Task(train=None)), recipe)
        assert done.events[0].startswith("computed in " + precision)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses[precision] = done.losses[-1]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.1)


def test_channels_last_gives_the_same_outputs_and_keeps_ties(able):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    model[1].weight = model[0].weight
    x = torch.randn(2, 16, 8, 8)
    chosen = numerics_for(model, "float32")
    expected = model(x)
    with chosen.applied(model):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        outputs = model(*chosen.to_layout((x,)))
    assert torch.allclose(outputs, expected, atol=1e-5)
    assert model[1].weight is model[0].weight
    assert model[0].weight.is_contiguous()
