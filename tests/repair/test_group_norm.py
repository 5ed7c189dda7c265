"""ReplaceBatchNorm: groups that divide, scales taken over, examples apart from each other, and a way back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402

torch.set_num_threads(1)


class Net(nn.Module):
    """One layer stands in two places, one follows a linear layer, one is never called."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.deep, self.again = nn.Conv2d(6, 6, 3, padding=1), self.norm
        self.wide, self.flat = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.head, self.spare = nn.Linear(8, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = self.again(self.deep(x)).relu().mean((2, 3))
        return self.head(self.flat(self.wide(x)).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net()
    for layer in (made.norm, made.flat):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    return made.eval()


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((48, 1, 6, 6)).astype("float32"), np.arange(48) % 3
    return pj.Task(train=(x, y), valid=(x[:9] + 1, y[:9]), test=(x[:9] - 1, y[:9]))


def test_scales_and_sharing_stay_and_groups_divide(net, task):
    applied = pj.apply(net, pj.ReplaceBatchNorm(groups=4), task)
    small = applied.model
    assert type(small.norm) is nn.GroupNorm
    assert small.again is small.norm
    assert (small.norm.num_groups, small.flat.num_groups) == (3, 4)
    assert torch.equal(small.norm.weight, net.norm.weight)
    assert torch.equal(small.flat.bias, net.flat.bias)
    assert type(net.norm) is nn.BatchNorm2d, "the argument is untouched"
    changes = {change.layer: change for change in applied.changes}
    assert changes["norm"].detail == {"groups": 3, "values": 72}
    assert changes["flat"].detail == {"groups": 4, "values": 2}
    assert changes["spare"].reason == "the model does not call it as a module"


def test_an_example_does_not_depend_on_the_others_in_training(net, task):
    small = pj.apply(net, pj.ReplaceBatchNorm(groups=4), task).model.train()
    x = torch.randn(5, 1, 6, 6)
    assert torch.allclose(small(x)[:1], small(x[:1]), atol=1e-5)
    assert not torch.allclose(net.train()(x)[:1], net(x[:2])[:1], atol=1e-2)


def test_groups_of_one_value_are_left_out_and_said(net, task):
    changes = {c.layer: c for c in pj.apply(net, pj.ReplaceBatchNorm(groups=8), task).changes}
    assert changes["flat"].reason == "a group of one value has no variance: take fewer groups"
    assert changes["norm"].done
    with pytest.raises(pj.Refused, match="no BatchNorm layer"):
        pj.apply(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), pj.ReplaceBatchNorm(), task)


def test_it_trains_with_batches_of_one_and_opens_on_the_users_class_and_without(net, task, tmp_path):
    plan = pj.chain(pj.ReplaceBatchNorm(groups=4), pj.FineTune(epochs=1, batch_size=1))
    applied = pj.apply(net, plan, task)
    x = task.prepare().valid.arrays()[0][0]
    pj.deliver(applied.model, pj.Target("torch"), tmp_path / "artefact", example=(x[:1],))
    with torch.no_grad():
        expected = applied.model(torch.from_numpy(x)).numpy()
    for more in ({"model": Net}, {}):
        found = pj.load(tmp_path / "artefact", **more)(x)
        assert np.allclose(found, expected, atol=1e-5)
    with pytest.raises(pj.Refused, match="BatchNorm layers that were replaced"):
        pj.load(tmp_path / "artefact", model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))


def test_channels_of_groups_are_cut_whole(net, task):
    applied = pj.apply(net, pj.chain(pj.ReplaceBatchNorm(groups=3), pj.PruneChannels(0.5, round_to=1)), task)
    kept = applied.model.conv.out_channels
    assert kept < 6
    assert kept % applied.model.norm.num_groups == 0
    assert np.isfinite(applied.model(torch.randn(2, 1, 6, 6)).detach().numpy()).all()
