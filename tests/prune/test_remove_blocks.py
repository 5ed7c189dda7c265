"""RemoveBlocks: the right number, a set judged as a whole, every block reported, refusals by name."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.structure.pass_through import PassThrough  # noqa: E402

torch.set_num_threads(1)


class Turn(nn.Module):
    """Adds `weight @ x` to x."""

    def __init__(self, matrix):
        super().__init__()
        self.linear = nn.Linear(len(matrix), len(matrix), bias=False)
        self.linear.weight.data = torch.tensor(matrix, dtype=torch.float32)

    def forward(self, x):
        return x + self.linear(x)


def pair_net():
    """Blocks 0 and 3 undo each other; blocks 1 and 2 each do little, but the same."""
    strong, weak = 2.0 * np.eye(4), 0.35 * np.eye(4)
    undo = np.linalg.inv(np.eye(4) + strong) - np.eye(4)
    body = nn.Sequential(Turn(strong), Turn(weak), Turn(weak), Turn(undo))
    torch.manual_seed(0)
    return nn.Sequential(body, nn.Linear(4, 3))


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 4)).astype("float32"), rng.integers(0, 3, 96)
    return pj.Task(train=(x, y), valid=(x[:32], y[:32]), test=(x[32:64], y[32:64]), max_overlap=1)


def removed(applied):
    return [c.layer for c in applied.changes if c.done]


def test_blocks_that_undo_each_other_go_together_though_each_alone_costs_most(task):
    applied = pj.apply(pair_net(), pj.RemoveBlocks(count=2), task)
    assert removed(applied) == ["0.0", "0.3"]
    alone = {c.layer: c.detail["divergence_alone"] for c in applied.changes}
    assert min(alone["0.0"], alone["0.3"]) > 2 * max(alone["0.1"], alone["0.2"]), "a sum would take 1 and 2"
    together = {c.detail["divergence_together"] for c in applied.changes if c.done}
    assert together == {0.0}
    assert applied.notes["blocks_removed"]["divergence"] < 1e-9
    model = pair_net()
    with torch.no_grad():
        x = torch.from_numpy(task.valid[0])
        wanted = model[1](model[0][2](model[0][1](x)))
    np.testing.assert_array_equal(BACKEND.run(applied.model, (task.valid[0],)), wanted.numpy())


def test_influence_ranks_by_the_turn_of_each_block(task):
    model = pair_net()
    with torch.no_grad():
        model[0][2].linear.weight.copy_(torch.tensor(np.roll(np.eye(4), 1, 0)))
    applied = pj.apply(model, pj.RemoveBlocks(count=1, score="influence"), task)
    influence = {c.layer: c.detail["influence"] for c in applied.changes}
    assert influence["0.2"] > 0.1 > max(v for k, v in influence.items() if k != "0.2")
    assert len(removed(applied)) == 1
    assert influence[removed(applied)[0]] == min(influence.values())
    assert all("divergence_alone" not in c.detail for c in applied.changes)


def test_ratio_is_the_share_of_the_blocks_and_only_limits_them(task):
    assert len(removed(pj.apply(pair_net(), pj.RemoveBlocks(ratio=0.7), task))) == 3
    applied = pj.apply(pair_net(), pj.only("0.1|0.2", pj.RemoveBlocks(ratio=0.5)), task)
    assert {c.layer for c in applied.changes} == {"0.1", "0.2"}
    assert len(removed(applied)) == 1
    assert sum(isinstance(m, PassThrough) for m in applied.model.modules()) == 1


def test_bad_amounts_are_refused(task):
    for fields in ({}, {"count": 1, "ratio": 0.5}):
        with pytest.raises(pj.Refused, match="exactly one of count and ratio must"):
            pj.RemoveBlocks(**fields)
    for method, rule in (
        (
            pj.RemoveBlocks(count=4),
            r"must remove at least one block and leave at least one, got 4.*from 1 to 3",
        ),
        (pj.RemoveBlocks(ratio=0.1), r"must remove at least one block.*0\.1 of 4 blocks: 0"),
        (pj.RemoveBlocks(ratio=0.9), r"0\.9 of 4 blocks: 4"),
        (pj.RemoveBlocks(count=1, evaluations=4), r"evaluations.*Allow 5 or more"),
        (pj.only("0.1", pj.RemoveBlocks(count=2)), r"from 1 to 1 of the 1 blocks that the plan covers"),
        (pj.only("nothing", pj.RemoveBlocks(count=1)), r"must match a layer of the model"),
    ):
        with pytest.raises(pj.Refused, match=rule):
            pj.apply(pair_net(), method, task)


def test_a_network_without_blocks_is_refused_with_the_reasons(task):
    plain = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)], nn.Linear(4, 3))
    with pytest.raises(
        pj.Refused, match=r"must change at least one layer.*0: it has no path around its weights"
    ):
        pj.apply(plain, pj.RemoveBlocks(count=1), task)


def test_a_regression_is_judged_by_its_error(task):
    task = pj.Task(
        train=(task.train[0], task.train[0][:, :3]),
        valid=(task.valid[0], task.valid[0][:, :3]),
        test=(task.test[0], task.test[0][:, :3]),
        loss=nn.functional.mse_loss,
        direction="minimize",
        metric=lambda outputs, targets: float(((outputs - targets) ** 2).mean()),
        max_overlap=1,
    )
    applied = pj.apply(pair_net(), pj.RemoveBlocks(count=2), task)
    assert removed(applied) == ["0.0", "0.3"]
    alone = next(c.detail["divergence_alone"] for c in applied.changes if c.layer == "0.1")
    x = torch.from_numpy(task.train[0])
    with torch.no_grad():
        full, model = pair_net()(x), pair_net()
        model[0][1] = nn.Identity()
        assert alone == pytest.approx(float((model(x) - full).square().sum() / full.square().sum()), abs=1e-5)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def test_depth_then_width_then_integers_is_delivered(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 1, 8, 8)).astype("float32"), rng.integers(0, 3, 96)
    task = pj.Task(train=(x, y), valid=(x[:32], y[:32]), test=(x[32:64], y[32:64]), max_overlap=1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Sequential(*[Residual(16) for _ in range(3)]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    plan = pj.chain(
        pj.RemoveBlocks(count=1),
        pj.PruneChannels(0.5),
        pj.ReestimateBatchNorm(examples=128),
        pj.Int8Static(examples=32),
    )
    float_model = pj.apply(model, plan[:-1], task).model
    convolutions = [m for m in float_model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape[0] for m in convolutions] == [8] * 5
    applied = pj.apply(model, plan, task)
    pj.deliver(applied, pj.Target(), tmp_path / "a", example=(x[:1],))
    found, wanted = pj.load(tmp_path / "a")(x), BACKEND.run(float_model, (x,))
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
