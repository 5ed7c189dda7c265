from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.backends.torch.distill.local_blocks import find_common_blocks


class Block(nn.Module):
    """A residual block with a width of its own inside."""

    def __init__(self, before, inner, after, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.skip(x) + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def net(inner=16, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stages = [
            nn.Sequential(Block(8, inner, 8), Block(8, inner, 8)),
            nn.Sequential(Block(8, inner, 16, 2)),
        ]
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
        )


BLOCKS = ("1.0", "1.1", "2.0")


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    parts = {"train": slice(640), "valid": slice(800, 900), "test": slice(1200, 1300)}
    return pj.Task(**{name: (x[part], y[part]) for name, part in parts.items()}).prepare()


@pytest.fixture(scope="module")
def teacher(task):
    return pj.apply(net(), pj.FineTune(epochs=4, batch_size=32), task).model.eval()


def same(a, b):
    return {name for name, tensor in a.state_dict().items() if torch.equal(tensor, b.state_dict()[name])}


def test_every_block_comes_nearer_to_its_own_and_nothing_else_moves(task, teacher):
    student, before = net(6, 3), {name: t.clone() for name, t in teacher.state_dict().items()}
    found = pj.distill(student, teacher, task, pj.DistillBlocks(epochs=3, batch_size=32))
    assert [change.layer for change in found.changes] == list(BLOCKS)
    for change in found.changes:
        assert change.detail["error_after"] < 0.7 * change.detail["error_before"]
    assert same(student, found.model) == {"0.weight", "0.bias", "5.weight", "5.bias"}
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert found.notes["training_s"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.model.modules())


def test_blocks_learn_apart_and_without_labels(task, teacher):
    """What one block learns depends neither on the others nor on the labels."""
    shuffled = pj.Task(
        train=(task.train.inputs[0], np.zeros(len(task.train), np.int64)),
        valid=task.valid.arrays(),
        test=task.test.arrays(),
    )
    how = {"epochs": 0.5, "batch_size": 32, "clip_norm": None}
    all_three = pj.distill(net(6, 3), teacher, task, pj.DistillBlocks(**how)).model
    for found in (
        pj.distill(net(6, 3), teacher, shuffled, pj.DistillBlocks(blocks=("1.1",), **how)),
        pj.distill(net(6, 3), teacher, shuffled, pj.only("1.1.*", pj.DistillBlocks(**how))),
    ):
        assert [change.layer for change in found.changes if change.done] == ["1.1"]
        assert torch.equal(found.model[1][1].conv1.weight, all_three[1][1].conv1.weight)
        assert torch.equal(found.model[1][0].conv1.weight, net(6, 3)[1][0].conv1.weight)


def test_a_cut_copy_is_taught_by_its_original(task, teacher):
    """Blocks whose inner channels alone are cut; bfloat16 serves as well."""
    cut = pj.only("*conv1", pj.PruneChannels(0.5))
    for precision in ("float32", "bfloat16"):
        plan = pj.chain(cut, pj.DistillBlocks(epochs=1, batch_size=32, precision=precision))
        changes = [c for c in pj.apply(teacher, plan, task).changes if c.method == "DistillBlocks"]
        assert [change.layer for change in changes] == list(BLOCKS)
        assert all(c.detail["error_after"] < c.detail["error_before"] for c in changes)


def test_layers_of_transformers_are_blocks(task, tiny_transformer):
    teacher, student = tiny_transformer(), tiny_transformer(inner=16, seed=1)
    assert find_common_blocks(student, teacher, task.valid.example()).names == ("body.0", "body.1")
    found = pj.distill(student, teacher, task, pj.DistillBlocks(epochs=1, batch_size=32, lr=0.01))
    assert all(c.detail["error_after"] < c.detail["error_before"] for c in found.changes)


def test_blocks_that_do_not_fit_are_reported_or_refused_with_both_shapes(task, teacher):
    student = net(6, 3)
    student[2][0] = Block(8, 6, 16, 4)
    found = pj.distill(student, teacher, task, pj.DistillBlocks(epochs=0.2))
    (skipped,) = [change for change in found.changes if not change.done]
    assert skipped.layer == "2.0"
    assert "makes [16, 2, 2] of [8, 8, 8], the teacher's makes [16, 4, 4]" in skipped.reason
    student[0] = nn.Conv2d(1, 4, 3, 1, 1)
    student[1][0] = Block(4, 6, 8, 2)
    with pytest.raises(pj.Refused, match=r"cannot take the teacher's \[8, 8, 8\]"):
        pj.distill(student, teacher, task, pj.DistillBlocks(blocks=("1.0",)))
    with pytest.raises(pj.Refused, match=r"'3\.1' must be a layer of the model"):
        pj.distill(net(6, 3), teacher, task, pj.DistillBlocks(blocks=("3.1",)))
    with pytest.raises(pj.Refused, match=r"blocks, 3.*it has no weights"):
        pj.distill(net(6, 3), teacher, task, pj.DistillBlocks(blocks=("1.0", "3")))
    with pytest.raises(pj.Refused, match="stochastic_depth"):
        pj.DistillBlocks(stochastic_depth=0.1)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(pj.Refused, match="no modules in a row in both"):
        pj.distill(flat, teacher, task, pj.DistillBlocks())
    with pytest.raises(pj.Refused, match="2 teachers"):
        pj.distill(net(6, 3), [teacher, teacher], task, pj.DistillBlocks())
