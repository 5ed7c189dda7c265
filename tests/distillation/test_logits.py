from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from oracles import distillation as oracle
from penjing.backends.torch import check
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.distillation.logits import Distill, distill_torch
from penjing.train.finetune import FineTune, fine_tune_torch
from penjing.train.teacher_outputs import CHECKED


class Copies:
    """What distillation asks of a backend."""

    name = "torch"

    def fingerprint(self, model):
        return check.fingerprint(model)

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

    def example(self):
        return tuple(x[:1] for x in self.hidden)

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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path))
    return tmp_path / "teachers"


def trained_through_the_cache(task, wrapped, **fields):
    Counting.rows = 0
    student, surroundings = mlp(8, 2), context(task, wrapped)
    distill_torch(student, Distill(**({"epochs": 1, "batch_size": 30} | fields)), surroundings)
    return student[1].weight, Counting.rows, surroundings.notes


def test_the_outputs_of_a_teacher_are_read_from_the_disk_the_second_time(task, teacher, folder):
    wrapped = Counting(teacher)
    first, rows, notes = trained_through_the_cache(task, wrapped)
    assert rows == 800
    assert notes["training_s"] > notes["teacher_s"] > 0
    again, rows, notes = trained_through_the_cache(task, wrapped)
    assert rows == CHECKED
    assert "800 examples were read from the cache" in " ".join(notes["events"])
    assert torch.equal(first, again)
    _, rows, _ = trained_through_the_cache(task, wrapped, temperature=4, loss="dist")
    assert rows == CHECKED


def test_other_data_another_teacher_and_another_precision_have_their_own_outputs(task, teacher, folder):
    wrapped = Counting(teacher)
    other = Task(train=Split(task.train.inputs, task.train.targets[::-1].copy(), "train"))
    for run, rows in (
        (lambda: trained_through_the_cache(task, wrapped), 800),
        (lambda: trained_through_the_cache(other, wrapped), 800),
        (lambda: trained_through_the_cache(task, Counting(mlp(4, 0))), 800),
        (lambda: trained_through_the_cache(task, wrapped, precision="bfloat16"), 800),
        (lambda: trained_through_the_cache(task, wrapped), CHECKED),
    ):
        assert run()[1] == rows
    assert len(list(folder.glob("*.npy"))) == 4


def test_nothing_is_kept_of_live_data_of_parts_or_where_it_is_not_wanted(task, teacher, folder):
    trained_through_the_cache(Task(train=Live(task.train)), teacher)
    for fields in ({"cache": False}, {"epochs": 0.5}, {"max_seconds": 100}):
        trained_through_the_cache(task, teacher, **fields)
    assert not folder.exists()


@pytest.mark.parametrize("fields", [{"flip": True}, {"mixup": 0.2}, {"shift": 1}])
def test_a_teacher_sees_the_examples_as_training_changes_them(task, teacher, folder, fields):
    _, rows, _ = trained_through_the_cache(task, Counting(teacher), epochs=2, **fields)
    assert rows >= 2 * 800
    assert not folder.exists()


def test_labels_are_smoothed_in_the_tasks_own_share_of_the_loss(task, teacher):
    weights = [
        trained_through_the_cache(task, teacher, label_smoothing=s, alpha=a)[0]
        for a in (0.5, 1.0)
        for s in (0.0, 0.3)
    ]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])


@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_a_damaged_table_is_computed_again(task, teacher, folder, damage):
    wrapped = Counting(teacher)
    first, _, _ = trained_through_the_cache(task, wrapped)
    (path,) = folder.glob("*.npy")
    path.write_bytes(damage)
    again, rows, notes = trained_through_the_cache(task, wrapped)
    assert rows == 800
    assert "was not used" in " ".join(notes["events"])
    assert torch.equal(first, again)


class Scaled(Counting):
    """Has a setting that no fingerprint sees."""

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


def test_a_table_that_is_not_what_the_teacher_gives_is_computed_again(task, teacher, folder):
    wrapped = Scaled(teacher)
    trained_through_the_cache(task, wrapped)
    wrapped.scale, Scaled.rows = 1.5, 0
    _, _, notes = trained_through_the_cache(task, wrapped)
    assert Scaled.rows == CHECKED + 800
    assert "not what it gives now" in " ".join(notes["events"])


def test_a_cache_that_cannot_be_written_is_said_and_no_error(task, teacher, folder):
    folder.write_text("a file where the folder should be")
    _, _, notes = trained_through_the_cache(task, teacher)
    assert "nothing was cached" in " ".join(notes["events"])


def test_remembered_logits_change_nothing(task, teacher, monkeypatch):
    import penjing.train.teacher_outputs as module

    students = []
    for table in (module.CACHE_BYTES, 0):
        monkeypatch.setattr(module, "CACHE_BYTES", table)
        student = mlp(8, 2)
        distill_torch(student, Distill(epochs=2, batch_size=30, cache=False), context(task, teacher))
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


LOSSES = [
    Distill(loss="logits", standardize=False),
    Distill(loss="dkd"),
    Distill(loss="dkd", standardize=True),
    Distill(loss="dist"),
    Distill(loss="mse", lr=0.2),
    Distill(loss="ranking"),
]


@pytest.mark.parametrize("method", LOSSES, ids=str)
def test_every_loss_brings_the_student_near_the_teacher(task, teacher, method):
    student, x = mlp(16, 1), task.valid.inputs[0]
    method = method.model_copy(update={"epochs": 4.0, "batch_size": 32})
    wanted = outputs(teacher, x)
    before = (outputs(student, x).argmax(1) == wanted.argmax(1)).mean()
    distill_torch(student, method, context(task, teacher))
    assert (outputs(student, x).argmax(1) == wanted.argmax(1)).mean() > max(0.8, before)


def test_a_loss_that_rises_begins_with_the_tasks_own():
    """At the first step nothing of the teacher is there, however wrong it is."""
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    y = np.arange(8) % 10
    students = []
    for teacher_seed in (3, 4):
        student = mlp(8, 0)
        method = Distill(epochs=1, batch_size=8, loss_warmup=1.0, alpha=0.9)
        distill_torch(student, method, context(Task(train=Split((x,), y, "train")), mlp(8, teacher_seed)))
        students.append(student[1].weight)
    assert torch.equal(*students)


class Regressor(nn.Module):
    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(64, width), nn.Linear(width, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x.flatten(1))))[:, 0]


def test_a_regression_without_labels(task):
    teacher, student, x = Regressor(32, 0), Regressor(8, 1), task.valid.inputs[0]
    wanted = outputs(teacher, x)
    own = Task(train=task.train, loss=lambda outputs, targets: (outputs - targets).square().mean())
    before = np.abs(outputs(student, x) - wanted).mean()
    distill_torch(student, Distill(loss="mse", alpha=1, epochs=5, batch_size=32), context(own, teacher))
    assert np.abs(outputs(student, x) - wanted).mean() < 0.3 * before
    with pytest.raises(Refused, match=r"'logits' cannot compare outputs that are values.*'mse'"):
        distill_torch(student, Distill(loss="logits"), context(own, teacher))


class Tagger(nn.Module):
    """Classes of tokens `[n, t]`: logits `[n, t, 5]`."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.out = nn.Embedding(11, width), nn.Linear(width, 5)

    def forward(self, ids):
        return self.out(self.table(ids))


def test_tokens_that_have_no_target_teach_nothing():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 11, (64, 6))
    targets = np.where(ids > 8, -100, ids % 5)

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    own = Task(train=Split((ids,), targets, "train"), loss=loss)
    teacher, student = Tagger(16, 0), Tagger(8, 1)
    unseen = student.table.weight[9:].detach().clone()
    method = Distill(epochs=30, batch_size=16, weight_decay=0, lr=0.5, alpha=1)
    distill_torch(student, method, context(own, teacher))
    assert torch.equal(student.table.weight[9:], unseen)
    inner = np.arange(1, 9)[None]
    assert (outputs(student, inner).argmax(-1) == outputs(teacher, inner).argmax(-1)).mean() > 0.8


def test_students_with_other_outputs_are_refused_with_both_shapes(task, teacher):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    with pytest.raises(Refused, match=r"student \(128, 12\), teacher \(128, 10\)"):
        distill_torch(student, Distill(), context(task, teacher))


def test_outputs_that_are_no_rows_of_logits_are_no_classes(task):
    single = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Sigmoid())
    own = Task(train=task.train, loss=lambda outputs, targets: (outputs[:, 0] - targets).abs().mean())
    with pytest.raises(Refused, match=r"cannot compare.*are values.*outputs \(256, 1\), targets \(256,\)"):
        distill_torch(single, Distill(loss="logits"), context(own, copy.deepcopy(single)))
    named = replace(own, loss="cross_entropy")
    with pytest.raises(Refused, match="at least two logits"):
        distill_torch(single, Distill(), context(named, copy.deepcopy(single)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"standardize": True, "loss": "ranking"},
        {"temperature": 2, "loss": "mse"},
        {"balance": (1, 1)},
        {"balance": (0, 0), "loss": "dkd"},
        {"loss_warmup": 2},
        {"loss": "kl"},
        {"alpha": 1.1},
        {"temperature": 0},
        {"epochs": 0},
        {"lr": -1},
        {"optimizer": "sdg"},
        {"ephocs": 1},
    ],
)
def test_wrong_values_fail_at_construction(wrong):
    with pytest.raises(Refused, match=next(iter(wrong))):
        Distill(**wrong)
