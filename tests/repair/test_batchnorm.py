"""ReestimateBatchNorm: exact pooled statistics, layer after layer, and nothing else changed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402

torch.set_num_threads(1)


def task_of(x):
    y = np.arange(len(x)) % 2
    return pj.Task(train=(x, y), valid=(x[:8] + 1, y[:8]), test=(x[:8] - 1, y[:8]))


@pytest.fixture
def data():
    return (np.random.default_rng(0).normal(2, 3, size=(48, 3, 5, 5))).astype("float32")


def test_one_pass_over_one_batch_gives_the_exact_statistics(data):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(100, 2),
    )
    model[1].num_batches_tracked.fill_(17)
    model.train()
    applied = pj.apply(model, pj.ReestimateBatchNorm(examples=960, batch_size=48), task_of(data))
    small = applied.model
    first = model[0](torch.from_numpy(data)).detach()
    assert torch.allclose(small[1].running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(small[1].running_var, first.transpose(0, 1).flatten(1).var(1), rtol=1e-4)
    normal = nn.functional.batch_norm(first, None, None, model[1].weight, model[1].bias, True).relu()
    second = model[3](normal).detach()
    assert torch.allclose(small[4].running_mean, second.mean((0, 2, 3)), atol=1e-5)
    assert small[1].num_batches_tracked == 17
    assert small.training
    assert torch.equal(model[1].running_mean, torch.zeros(4)), "the argument is untouched"
    assert [(c.layer, c.done) for c in applied.changes] == [("1", True), ("4", True)]
    assert applied.changes[0].detail["observations"] == 48 * 25


def test_batches_are_pooled_and_a_last_one_of_one_is_left_out():
    x = np.random.default_rng(1).normal(size=(9, 3)).astype("float32")
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    applied = pj.apply(model, pj.ReestimateBatchNorm(examples=80, batch_size=4), task_of(x))
    assert applied.changes[0].detail["observations"] == 8
    order = np.random.default_rng(0).permutation(9)[:8]
    assert np.allclose(applied.model[0].running_mean, x[order].mean(0), atol=1e-6)
    assert np.allclose(applied.model[0].running_var, x[order].var(0, ddof=1), rtol=1e-5)


def test_it_repairs_a_pruned_network(data):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(400, 2),
    )
    plan = pj.chain(pj.PruneChannels(0.5), pj.ReestimateBatchNorm())
    small = pj.apply(model, plan, task_of(data)).model.eval()
    after = small[:5](torch.from_numpy(data)).detach()
    assert torch.allclose(after.mean((0, 2, 3)), torch.zeros(8), atol=0.05)
    assert torch.allclose(after.std((0, 2, 3)), torch.ones(8), atol=0.05)


def test_no_batchnorm_no_statistics_and_too_little_data_are_refused(data):
    with pytest.raises(pj.Refused, match="no BatchNorm layer"):
        pj.apply(nn.Sequential(nn.Flatten(), nn.Linear(75, 2)), pj.ReestimateBatchNorm(), task_of(data))
    free = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(75, 2))
    with pytest.raises(pj.Refused, match="no running statistics"):
        pj.apply(free, pj.ReestimateBatchNorm(), task_of(data))
    with pytest.raises(pj.Refused, match="greater than or equal to 2"):
        pj.ReestimateBatchNorm(examples=20, batch_size=1)
