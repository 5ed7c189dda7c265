from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from penjing.arrays import distillation as oracle
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.distill.logits import Distill, distill_torch
from penjing.train.finetune import FineTune, fine_tune_torch
from penjing.train.teacher import hinton_loss


class Copies:
    """The one thing of a backend that distillation asks for."""

    name = "torch"

    def copy(self, model):
        return copy.deepcopy(model)


def mlp(width, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def context(task, teacher, **fields):
    return Context(task=task, backend=Copies(), original=teacher, **fields)


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(x)).numpy()


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


@pytest.fixture(scope="module")
def task(digits):
    x, y = digits
    return Task(*(Split((x[s],), y[s], n) for s, n in ((slice(800), "train"), (slice(800, 1200), "valid"))))


@pytest.fixture(scope="module")
def teacher(task):
    model = mlp(64, 0)
    fine_tune_torch(model, FineTune(epochs=6, batch_size=32), context(task, model))
    return model


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_loss_agrees_with_numpy_and_its_gradient_with_finite_differences(standardized, temperature):
    generator = np.random.default_rng(3)
    student, teacher = generator.normal(size=(2, 5, 7)) * 3

    def reference(z):
        pair = (oracle.standardize(z), oracle.standardize(teacher)) if standardized else (z, teacher)
        return oracle.hinton_loss(*pair, temperature)

    tensor = torch.tensor(student, requires_grad=True)
    loss = hinton_loss(tensor, torch.tensor(teacher), temperature, standardized)
    loss.backward()
    assert loss.item() == pytest.approx(reference(student), rel=1e-9)
    for row, column in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[row, column] = 1e-5
        slope = (reference(student + step) - reference(student - step)) / 2e-5
        assert float(tensor.grad[row, column]) == pytest.approx(slope, abs=1e-7)


def test_a_constant_row_has_a_finite_gradient():
    student = torch.zeros(2, 4, requires_grad=True)
    hinton_loss(student, torch.randn(2, 4), 2.0, True).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_the_student_comes_closer_to_the_teacher(task, teacher, alpha):
    student, x = mlp(16, 1), task.valid.inputs[0]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    wanted = outputs(teacher, x)

    def distance():
        pair = oracle.standardize(outputs(student, x)), oracle.standardize(wanted)
        return oracle.hinton_loss(*pair, 2.0)

    far = distance()
    surroundings = context(task, teacher)
    done = distill_torch(student, Distill(epochs=5, batch_size=32, alpha=alpha), surroundings)
    assert done.model is student
    assert distance() < 0.3 * far
    agree = (outputs(student, x).argmax(1) == wanted.argmax(1)).mean()
    assert agree > 0.85
    (change,) = done.changes
    assert (change.method, change.layer, change.status) == ("Distill", "*", "done")
    assert change.detail["loss_after"] < change.detail["loss_before"]
    assert surroundings.notes["training_s"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters())


class Counting(nn.Module):
    """Counts the rows that pass through the copies of a module."""

    rows = 0

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        type(self).rows += len(x)
        assert not self.training
        return self.inside(x)


class Live(Split):
    """Data that changes at every pass: there are no arrays to look at."""

    def __init__(self, split):
        super().__init__(split.inputs, split.targets, split.name)
        self.hidden, self.inputs = self.inputs, None

    def batches(self, size, seed=None):
        for x, y in Split(self.hidden, self.targets, self.name).batches(size, seed):
            yield (x[0] + np.float32(0.01),), y


def test_the_teacher_sees_unchanging_examples_once_and_live_ones_every_time(task, teacher):
    wrapped = Counting(teacher)
    train = Split((task.train.inputs[0][:100],), task.train.targets[:100], "train")
    recipe = Distill(epochs=3, batch_size=30)
    weights = []
    for split, rows in ((train, 100), (Live(train), 300)):
        Counting.rows = 0
        student = mlp(8, 2)
        distill_torch(student, recipe, context(Task(train=split), wrapped))
        assert Counting.rows == rows
        weights.append(student[1].weight)
    assert not torch.equal(*weights)


def test_remembered_logits_change_nothing(task, teacher, monkeypatch):
    import penjing.train.teacher as module

    students = []
    for table in (module.CACHE_BYTES, 0):
        monkeypatch.setattr(module, "CACHE_BYTES", table)
        student = mlp(8, 2)
        distill_torch(student, Distill(epochs=2, batch_size=30), context(task, teacher))
        students.append(student)
    assert torch.allclose(students[0][1].weight, students[1][1].weight, atol=1e-5)


def test_same_seed_same_student(task, teacher):
    students = [mlp(8, 2) for _ in range(3)]
    for student, seed in zip(students, (1, 1, 2), strict=True):
        distill_torch(student, Distill(epochs=0.3), context(task, teacher, seed=seed))
    assert torch.equal(students[0][1].weight, students[1][1].weight)
    assert not torch.equal(students[0][1].weight, students[2][1].weight)


def test_only_what_is_covered_trains(task, teacher):
    student = mlp(8, 2)
    first = student[1].weight.clone()
    distill_torch(student, Distill(epochs=0.3), context(task, teacher, covers=lambda layer: layer == "3"))
    assert torch.equal(first, student[1].weight)


def test_outputs_that_are_no_rows_of_logits_are_refused(task):
    single = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Sigmoid())
    own = Task(train=task.train, loss=lambda outputs, targets: (outputs[:, 0] - targets).abs().mean())
    with pytest.raises(Refused, match="at least two logits"):
        distill_torch(single, Distill(), context(own, copy.deepcopy(single)))


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": 1.1}, {"temperature": 0}, {"epochs": 0}, {"lr": -1}, {"optimizer": "sdg"}, {"ephocs": 1}],
)
def test_wrong_values_fail_at_construction(wrong):
    with pytest.raises(Refused, match=next(iter(wrong))):
        Distill(**wrong)
