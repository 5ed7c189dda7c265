from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.backends.torch.observe.taps import pair_layers, tapped

BETA = {"features": 3.0, "attention": 100.0, "relational": 1.0}


def net(width, seed, stride=2):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stages = [(1, width, 1), (width, 2 * width, stride)]
        model = nn.Sequential()
        for number, (a, b, step) in enumerate(stages):
            parts = nn.Conv2d(a, b, 3, step, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            model.add_module(f"stage{number}", nn.Sequential(*parts))
        for name, part in (
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flat", nn.Flatten()),
            ("fc", nn.Linear(2 * width, 10)),
        ):
            model.add_module(name, part)
        return model


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    parts = {"train": slice(512), "valid": slice(800, 900), "test": slice(1200, 1300)}
    return pj.Task(**{name: (x[part], y[part]) for name, part in parts.items()}).prepare()


@pytest.fixture(scope="module")
def teacher(task):
    return pj.apply(net(8, 0), pj.FineTune(epochs=3, batch_size=32), task).model.eval()


def seen(model, name, task):
    with tapped(model, [name]) as found, torch.no_grad():
        model.eval()(torch.from_numpy(task.valid.inputs[0]))
    return found[name]


def gap(relation, model, teacher, task):
    from penjing.backends.torch.distill import feature_losses as losses

    mine, wanted = (seen(m, "stage1", task) for m in (model, teacher))
    if relation == "features":
        return explained(mine, wanted)
    if relation == "attention":
        return losses.attention_loss(mine, wanted)
    return losses.relational_loss(losses.pool_positions(mine), losses.pool_positions(wanted), (25.0, 50.0))


def explained(student, wanted):
    """Share of the squares of the teacher's channels that no linear map of the student's gives."""
    x, y = (t.movedim(1, -1).flatten(0, -2).double() for t in (student, wanted))
    fit = x @ torch.linalg.lstsq(x, y).solution
    return float((fit - y).square().sum() / y.square().sum())


@pytest.mark.parametrize("relation", list(BETA))
def test_a_thinner_student_comes_nearer_to_the_teachers_layers(task, teacher, relation):
    how = {"epochs": 4, "batch_size": 32}
    student, before = net(5, 1), {name: t.clone() for name, t in teacher.state_dict().items()}
    alone = pj.apply(student, pj.FineTune(**how), task).model
    found = pj.distill(
        student, teacher, task, pj.DistillFeatures(relation=relation, alpha=0.0, beta=BETA[relation], **how)
    )
    assert gap(relation, found.model, teacher, task) < 0.9 * gap(relation, alone, teacher, task)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert found.model.state_dict().keys() == student.state_dict().keys()
    (change,) = found.changes
    assert (change.method, change.layer, change.done) == ("DistillFeatures", "*", True)
    pairs = "stage1 to stage1" if relation == "relational" else "stage0 to stage0, stage1 to stage1"
    assert change.detail["pairs"] == pairs
    assert not any(m._forward_hooks for m in found.model.modules())


def test_named_pairs_only_and_no_labels_at_alpha_one(task, teacher):
    shuffled = pj.Task(
        train=(task.train.inputs[0], np.random.default_rng(0).permutation(task.train.targets)),
        valid=task.valid.arrays(),
        test=task.test.arrays(),
    )
    method = pj.DistillFeatures(pairs={"stage1.0": "stage1.0"}, alpha=1, epochs=0.5, batch_size=32)
    found = [pj.distill(net(4, 1), teacher, t, method) for t in (task, shuffled)]
    assert found[0].changes[0].detail["pairs"] == "stage1.0 to stage1.0"
    assert torch.equal(*(f.model.fc.weight for f in found))


def test_the_original_teaches_its_cut_copy(task, teacher):
    plan = pj.chain(pj.PruneChannels(0.5), pj.DistillFeatures(epochs=3, batch_size=32, alpha=0.0))
    found = pj.apply(teacher, plan, task)
    assert found.changes[-1].detail["loss_after"] < found.changes[-1].detail["loss_before"]


def test_only_some_layers_train_whatever_the_projections(task, teacher):
    student = net(4, 1)
    method = pj.DistillFeatures(epochs=0.3, batch_size=32)
    found = pj.distill(student, teacher, task, pj.only("stage1.*", method)).model
    assert torch.equal(found.fc.weight, student.fc.weight)
    assert not torch.equal(found.stage1[0].weight, student.stage1[0].weight)
    with pytest.raises(pj.Refused, match="must cover a layer with parameters"):
        pj.distill(student, teacher, task, pj.only("stage1", method))


def test_bfloat16_and_the_same_seed(task, teacher):
    method = pj.DistillFeatures(epochs=0.3, batch_size=32, precision="bfloat16")
    found = [pj.distill(net(4, 1), teacher, task, method, seed=seed).model.fc.weight for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_blocks_of_transformers_are_mapped_in_order(task, tiny_transformer):
    deep, shallow = tiny_transformer(), tiny_transformer(width=16, head_width=4)
    del shallow.body[1]
    example = task.valid.example()
    assert pair_layers(shallow, deep, example) == [("body.0", "body.1")]
    assert pair_layers(deep, deep, example) == [("body.0", "body.0"), ("body.1", "body.1")]
    found = pj.distill(shallow, deep, task, pj.DistillFeatures(epochs=0.3, batch_size=32))
    assert found.changes[0].detail["pairs"] == "body.0 to body.1"


@pytest.mark.parametrize(
    ("student", "how", "words"),
    [
        (net(4, 1), {"projection": "none"}, r"\[4, 8, 8\], teacher \[8, 8, 8\].*1x1 convolution of 4 to 8"),
        (net(4, 1), {"pairs": {"stage0": "stage1"}}, r"\[4, 8, 8\], teacher \[16, 4, 4\].*with stride 2"),
        (net(4, 1), {"pairs": {"stage1": "stage0"}}, "An interpolation"),
        (net(4, 1), {"pairs": {"stage1": "flat"}}, "A pooling"),
        (net(4, 1), {"pairs": {"fc": "flat"}, "projection": "none"}, "a linear layer of 10 to 16"),
        (net(4, 1), {"pairs": {"stage9": "stage1"}}, "stage9.*Did you mean .stage1"),
        (net(4, 1), {"pairs": {"stage1": "stage9"}}, "stage9.*Did you mean"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), {}, "Name them: pairs="),
    ],
)
def test_layers_that_do_not_belong_together_are_refused(task, teacher, student, how, words):
    with pytest.raises(pj.Refused, match=words):
        pj.distill(student, teacher, task, pj.DistillFeatures(**how))


def test_several_teachers_and_layers_without_a_tensor_are_refused(task, teacher):
    with pytest.raises(pj.Refused, match="2 teachers"):
        pj.distill(net(4, 1), [teacher, teacher], task, pj.DistillFeatures())

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.unused = net(4, 1), nn.Linear(1, 1)

        def forward(self, x):
            return self.inside(x)

    with pytest.raises(pj.Refused, match="not called as a module"):
        pj.distill(Odd(), teacher, task, pj.DistillFeatures(pairs={"unused": "fc"}))
