"""PruneChannels: the right share, the right channels, every covered layer reported."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.core.backend import backend_named  # noqa: E402

torch.set_num_threads(1)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 3),
    )


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 1, 6, 6)).astype("float32"), rng.integers(0, 3, 96)
    return pj.Task(train=(x, y), valid=(x[:32], y[:32]), test=(x[32:64], y[32:64]), max_overlap=1)


def test_half_of_every_group_goes_and_every_layer_is_reported(task):
    model = small_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    applied = pj.apply(model, pj.PruneChannels(0.5), task)
    assert [tuple(m.weight.shape) for m in applied.model if hasattr(m, "weight") and m.weight.ndim > 1] == [
        (16, 1, 3, 3),
        (8, 16, 3, 3),
        (16, 128),
        (3, 16),
    ]
    assert [(c.layer, c.done) for c in applied.changes] == [
        ("0", True),
        ("3", True),
        ("6", True),
        ("8", True),
    ]
    assert applied.changes[1].detail == {"out_before": 16, "out_after": 8, "in_before": 32, "in_after": 16}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the argument is untouched"


def test_l2_keeps_the_strongest_channels(task):
    model = small_net()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            tensor[8:] *= 0.01
        model[3].weight[:, 8:] *= 0.01
    applied = pj.apply(model, pj.only("0", pj.PruneChannels(0.75)), task)
    assert torch.equal(applied.model[0].weight, model[0].weight[:8])
    assert [c.layer for c in applied.changes] == ["0", "3"], "the next layer lost inputs"


def test_taylor_removes_channels_without_effect_and_is_reproducible(task):
    model = small_net()
    with torch.no_grad():
        model[3].weight[:, :16] = 0
        model[0].weight[:16] *= 100
    method = pj.only("0", pj.PruneChannels(0.5, score="taylor", examples=64))
    first, second = (pj.apply(model, method, task).model for _ in range(2))
    assert torch.equal(first[3].weight, model[3].weight[:, 16:])
    assert torch.equal(first[0].weight, second[0].weight)
    x = torch.from_numpy(task.valid[0])
    assert torch.allclose(first.eval()(x), model.eval()(x), atol=1e-4)


def test_a_ratio_that_would_remove_everything_keeps_one_multiple(task):
    applied = pj.apply(small_net(), pj.PruneChannels(0.999), task)
    assert [m.weight.shape[0] for m in applied.model if hasattr(m, "weight")] == [8, 8, 8, 8, 3]
    assert "one multiple of 8" in applied.changes[0].reason
    assert applied.changes[0].detail["out_after"] == 8


def test_what_stays_whole_says_why(task):
    applied = pj.apply(small_net(), pj.PruneChannels(0.2, round_to=16), task)
    by_layer = {c.layer: c for c in applied.changes}
    assert by_layer["0"].detail["out_after"] == 32
    assert "multiple of 16" in by_layer["0"].reason
    assert by_layer["8"].done, "its inputs shrank"
    with pytest.raises(pj.Refused, match="output of the model"):
        pj.apply(small_net(), pj.only("8", pj.PruneChannels(0.5)), task)
    with pytest.raises(
        pj.Refused, match=r"each pattern of only.* must match a layer of the model, got 'nothing\*'"
    ):
        pj.apply(small_net(), pj.only("nothing*", pj.PruneChannels(0.5)), task)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = self.a(x)
        return self.c((x + self.b(x)).mean((2, 3)))


def test_a_group_that_is_covered_in_part_stays(task):
    with pytest.raises(pj.Refused, match="does not cover: b"):
        pj.apply(Residual(), pj.only("a", pj.PruneChannels(0.5)), task)
    applied = pj.apply(Residual(), pj.only("a|b", pj.PruneChannels(0.5)), task)
    assert applied.model.b.weight.shape == (8, 8, 1, 1)


def test_nothing_to_prune_is_refused(task):
    with pytest.raises(pj.Refused, match="must change at least one layer"):
        pj.apply(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), pj.PruneChannels(0.5), task)


def test_pruned_twice(task):
    once = pj.apply(small_net(), pj.PruneChannels(0.5), task)
    twice = pj.apply(once.model, pj.PruneChannels(0.5), task)
    assert twice.model[0].weight.shape[0] == 8
    assert len(twice.model._penjing_history) == 2


def test_bad_values_fail_at_construction():
    for bad in (
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"ratio": 0.5, "score": "l3"},
        {"ratio": 0.5, "round_to": 0},
        {"ratio": 0.5, "rounding": 8},
    ):
        with pytest.raises(pj.Refused):
            pj.PruneChannels(**bad)
    assert repr(pj.PruneChannels(0.3, score="taylor")) == "PruneChannels(ratio=0.3, score='taylor')"
    assert backend_named("torch").name == "torch"
