from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj


def mlp(width, seed, outputs=10):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, outputs))


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    parts = {"train": slice(800), "valid": slice(800, 1200), "test": slice(1200, None)}
    return pj.Task(**{name: (x[part], y[part]) for name, part in parts.items()}).prepare()


@pytest.fixture(scope="module")
def teachers(task):
    return [pj.apply(mlp(48, seed), pj.FineTune(epochs=4, batch_size=32), task).model for seed in (0, 1)]


def logits(model, task):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(task.valid.inputs[0]))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_student_of_another_width_follows_its_teacher(task, teachers):
    student, before = mlp(12, 5), [state(m) for m in (mlp(12, 5), teachers[0])]
    lines = []
    found = pj.distill(
        student,
        teachers[0],
        task,
        pj.Distill(epochs=5, batch_size=32, alpha=1),
        say=lambda line: lines.append(str(line)),
    )
    wanted = logits(teachers[0], task).argmax(1)
    agreement = [(logits(model, task).argmax(1) == wanted).float().mean() for model in (student, found.model)]
    assert agreement[1] > 0.85 > agreement[0] + 0.3
    for model, old in zip((student, teachers[0]), before, strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in model.state_dict().items())
    assert [change.method for change in found.changes] == ["Distill"]
    assert found.notes["training_s"] > 0
    assert len(lines) == 5


def test_two_teachers_are_nearer_to_their_mean_than_one_and_weights_count(task, teachers):
    wanted = sum(logits(t, task).div(2).softmax(1) for t in teachers) / 2
    method = pj.Distill(epochs=8, batch_size=32, alpha=1, standardize=False)

    def distance(**how):
        found = pj.distill(mlp(48, 5), how.pop("teacher"), task, method, **how)
        return float((logits(found.model, task).div(2).softmax(1) - wanted).square().mean())

    both = distance(teacher=teachers)
    assert both < distance(teacher=teachers[0])
    assert both < distance(teacher=teachers, weights=[1, 1e-6])


def test_one_teacher_twice_is_one_teacher(task, teachers):
    method = pj.Distill(epochs=0.5, batch_size=32)
    found = [pj.distill(mlp(8, 3), t, task, method).model[1].weight for t in (teachers[0], [teachers[0]] * 2)]
    assert torch.allclose(*found, atol=1e-5)


def test_only_some_layers_of_the_student_train(task, teachers):
    student = mlp(8, 3)
    found = pj.distill(student, teachers[0], task, pj.only("3", pj.Distill(epochs=0.5))).model
    assert torch.equal(found[1].weight, student[1].weight)
    assert not torch.equal(found[3].weight, student[3].weight)


@pytest.mark.parametrize(
    "method",
    [pj.Distill(epochs=1), pj.DistillFeatures(pairs={"1": "1"}, epochs=0.5)],
    ids=lambda m: type(m).__name__,
)
def test_a_teacher_may_have_another_type_of_numbers(task, teachers, method):
    import copy

    found = [
        pj.distill(mlp(8, 3), t, task, method).model[3].weight
        for t in (teachers[0], copy.deepcopy(teachers[0]).double())
    ]
    assert torch.allclose(*found, atol=1e-4)


class Two(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        y = self.inside(x)
        return {"other": y.sum(), "logits": y}


def test_the_output_that_the_task_names_counts(task, teachers):
    from dataclasses import replace

    own = replace(task, output="logits")
    method = pj.Distill(epochs=0.5, batch_size=32)
    plain = pj.distill(mlp(8, 3), teachers, task, method).model
    found = pj.distill(Two(mlp(8, 3)), [Two(t) for t in teachers], own, method).model
    assert torch.equal(logits(found, task), logits(plain, task))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"method": pj.FineTune()}, "must be a method with a teacher"),
        ({"method": "Distill"}, "must be a method with a teacher"),
        ({"teacher": []}, "an empty list"),
        ({"weights": [1, 2]}, "number above 0 for each teacher"),
        ({"weights": [0]}, "number above 0 for each teacher"),
        ({"weights": [float("nan")]}, "number above 0 for each teacher"),
        ({"teacher": [mlp(4, 0), mlp(4, 0, 7)]}, r"\(10,\), \(7,\)"),
        ({"teacher": mlp(4, 0, 7)}, r"student \(128, 10\), teacher \(128, 7\)"),
        ({"teacher": nn.Linear(3, 10)}, "must run on an example"),
        ({"teacher": "resnet"}, "supported framework"),
        ({"student": "resnet"}, "supported framework"),
    ],
)
def test_what_cannot_be_distilled_is_refused(task, how, words):
    with pytest.raises(pj.Refused, match=words):
        pj.distill(**({"student": mlp(4, 1), "teacher": mlp(4, 0), "task": task} | how))
