"""MatchStatistics: every channel has the mean and the variance of the original's, layer after layer."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.core.backend import backend_named  # noqa: E402
from penjing.core.context import Context  # noqa: E402

torch.set_num_threads(1)
BACKEND = backend_named("torch")
MATCH = pj.MatchStatistics(examples=64, shrinkage=0)
X = np.random.default_rng(0).normal(1, 2, size=(64, 2, 6, 6)).astype("float32")


@pytest.fixture(scope="module")
def task():
    y = np.arange(64) % 2
    return pj.Task(train=(X, y), valid=(X[:8] + 1, y[:8]), test=(X[:8] - 1, y[:8])).prepare()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1, bias=False),
        nn.Flatten(),
        nn.Linear(32, 6),
    )


@pytest.fixture(scope="module")
def models(task):
    original = pj.apply(net(), pj.ReestimateBatchNorm(examples=1280, batch_size=64), task).model.eval()
    return original, pj.apply(original, pj.PruneChannels(0.5), task).model.eval()


def matched(models, task, method=MATCH):
    context = Context(task=task, backend=BACKEND, original=models[0])
    return pj.apply(models[1], method, task, context=context)


def moments(model, until):
    with torch.no_grad():
        y = model[:until](torch.from_numpy(X))
    axes = [a for a in range(y.ndim) if a != 1]
    return y.mean(axes).numpy(), y.var(axes).numpy()


def kept(models, until):
    """Moments of the original's channels that the small model still has."""
    from penjing.backends.torch.structure.history import lineage

    mean, variance = moments(models[0], until)
    rows = lineage(models[1]).get(f"{until - 1}.weight", {}).get(0, slice(None))
    return mean[rows], variance[rows]


def test_means_and_variances_are_those_of_the_original(models, task):
    applied = matched(models, task)
    for until in (2, 4, 8):
        for found, wanted in zip(moments(applied.model, until), kept(models, until), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moments(applied.model, 6)[1], kept(models, 6)[1], rtol=1e-3)
    found = {c.layer: (c.done, c.reason) for c in applied.changes}
    assert found == {
        "0": (False, "1 behind it is matched"),
        "1": (False, "its statistics are those of the original"),
        "3": (True, ""),
        "5": (True, "no bias: the mean stays"),
        "7": (True, ""),
    }
    assert applied.changes[2].detail["scale_max"] > 1


def test_batchnorm_takes_statistics_anew_and_matches_by_its_affine_parameters(models, task):
    original, _ = models
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed[0].weight.mul_(torch.linspace(0.3, 3, 16).reshape(16, 1, 1, 1))
        changed[0].bias.add_(1)
    applied = matched((original, changed), task, pj.only("0|1", MATCH))
    inputs = changed[0](torch.from_numpy(X)).detach()
    assert torch.allclose(applied.model[1].running_mean, inputs.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(applied.model[1].running_var, inputs.var((0, 2, 3)), rtol=1e-3)
    # With true statistics the old affine parameters are right again.
    assert torch.allclose(applied.model[1].weight, original[1].weight, rtol=1e-2)
    assert torch.allclose(applied.model[1].bias, original[1].bias, atol=1e-2)
    assert torch.equal(applied.model[0].weight, changed[0].weight)
    assert {c.layer: c.done for c in applied.changes} == {"0": False, "1": True}
    alone = matched((original, changed), task, pj.only("0", MATCH))
    assert alone.changes[0].done, "without BatchNorm in the plan, the convolution itself is matched"
    assert torch.equal(alone.model[1].running_mean, changed[1].running_mean)


def test_bias_correction_moves_means_and_nothing_else(models, task):
    applied = matched(models, task, pj.MatchStatistics(examples=64, variance=False))
    for name, tensor in applied.model.state_dict().items():
        if not name.endswith("bias"):
            assert torch.equal(tensor, models[1].state_dict()[name]), name
    np.testing.assert_allclose(moments(applied.model, 4)[0], kept(models, 4)[0], atol=1e-4)
    np.testing.assert_allclose(moments(applied.model, 8)[0], kept(models, 8)[0], atol=1e-4)
    assert {c.layer: c.reason for c in applied.changes}["5"] == "it has no bias"


def test_a_dead_channel_is_not_blown_up(models, task):
    original, small = models
    dead = copy.deepcopy(small)
    with torch.no_grad():
        dead[3].weight[0] *= 1e-6
    context = Context(task=task, backend=BACKEND, original=original)
    applied = pj.apply(dead, pj.MatchStatistics(examples=64), task, context=context)
    change = next(c for c in applied.changes if c.layer == "3")
    assert change.detail["scale_max"] < 20
    assert np.isfinite(BACKEND.run(applied.model, (X,))).all()


def test_it_is_repeatable_and_leaves_the_original_alone(models, task):
    before = [BACKEND.fingerprint(model) for model in models]
    first, second = (matched(models, task) for _ in range(2))
    assert BACKEND.fingerprint(first.model) == BACKEND.fingerprint(second.model)
    assert [BACKEND.fingerprint(model) for model in models] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in models[0].modules())


def test_nothing_to_match_and_too_little_data_are_refused(models, task):
    with pytest.raises(pj.Refused, match="statistics are those of the original"):
        matched((models[0], models[0]), task)
    few = pj.Task(
        train=(X[:20], np.arange(20) % 2),
        valid=(X[20:40], np.arange(20) % 2),
        test=(X[40:60], np.arange(20) % 2),
    ).prepare()
    with pytest.raises(pj.Refused, match="at least 32 training examples"):
        matched(models, few)
    plain = nn.Sequential(
        nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()
    )
    with pytest.raises(pj.Refused, match="no affine parameters; 1: it keeps no running statistics"):
        matched((plain, plain), task)
