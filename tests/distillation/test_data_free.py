"""Distillation where there is no data: inputs made from BatchNorm statistics, and noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.calibration.synthetic import with_synthetic_training
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.distillation.logits import Distill


class Normalized(nn.Module):
    """Classes of images [n, 1, 8, 8] with BatchNorm."""

    def __init__(self, width, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inside = nn.Sequential(
                nn.BatchNorm2d(1),
                nn.Conv2d(1, width, 3, 2),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(9 * width, 4),
            )

    def forward(self, x):
        return self.inside(x)


@pytest.fixture(scope="module")
def stripes():
    """Images of bright stripes at four places, whose number is the class, and a teacher that knows them."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    x = rng.normal(-0.5, 0.5, (400, 1, 8, 8)).astype(np.float32)
    x[np.arange(400), :, 2 * y] += 2
    task = Task(train=(x[:256], y[:256]), valid=(x[256:320], y[256:320]), test=(x[320:], y[320:])).prepare()
    return task, pj.apply(Normalized(8, 0), pj.FineTune(epochs=8, batch_size=32), task).model.eval()


def right(model, task):
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(task.test.inputs[0])).argmax(1)
    return float((found.numpy() == task.test.targets).mean())


def test_a_teacher_teaches_without_data(stripes):
    task, teacher = stripes
    # What is there says nothing: constant images with one label.
    empty = Split((np.ones((64, 1, 8, 8), np.float32),), np.zeros(64, np.int64), "train")
    blind = replace(task, train=empty)
    method = Distill(data="synthetic", examples=258, epochs=8, batch_size=32)
    found = pj.distill(Normalized(4, 1), teacher, blind, method)
    detail = found.changes[0].detail
    assert right(teacher, task) > 0.95
    assert right(found.model, task) > 0.8
    assert detail["loss_after"] < 0.2 * detail["loss_before"]
    assert detail["steps"] == 72
    assert found.notes["made_inputs_s"] > 0


def test_noise_teaches_where_there_is_no_batchnorm(stripes):
    task, _ = stripes
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)) for _ in range(2))
    found = pj.distill(student, teacher, task, Distill(data="noise", examples=256, epochs=60, lr=0.2)).model
    x = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alike = [float((model(x).argmax(1) == teacher(x).argmax(1)).float().mean()) for model in (student, found)]
    assert alike[1] > 0.8 > alike[0] + 0.3
    with pytest.raises(Refused, match="data='noise'"):
        pj.distill(student, teacher, task, Distill(data="synthetic"))


def test_made_inputs_differ_by_batch_and_by_seed_and_are_as_many_as_asked(stripes):
    task, teacher = stripes
    own = Context(task=task, backend=BACKEND, original=teacher)
    for kind in ("noise", "synthetic"):
        (x,), (again,) = (with_synthetic_training(teacher, own, 65, kind).task.train.inputs for _ in range(2))
        assert x.shape == (65, 1, 8, 8)
        assert x.dtype == np.float32
        assert np.array_equal(x, again)
        assert len(np.unique(x.reshape(65, -1), axis=0)) == 65
        other = with_synthetic_training(teacher, replace(own, seed=1), 65, kind).task.train.inputs[0]
        assert not np.isin(other[:, 0, 0, 0], x[:, 0, 0, 0]).any()


@pytest.mark.parametrize("kind", ["noise", "synthetic"])
def test_tokens_cannot_be_made(kind):
    ids = np.arange(60).reshape(20, 3) % 11
    task = Task(train=(ids, ids[:, 0] % 2), valid=(ids[:5] + 11, ids[:5, 0] % 2))
    student, teacher = (nn.Sequential(nn.Embedding(30, 4), nn.Flatten(), nn.Linear(12, 2)) for _ in range(2))
    with pytest.raises(Refused, match="int64"):
        pj.distill(student, teacher, task, Distill(data=kind))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"alpha": 0.9, "data": "noise"}, "alpha must be 1"),
        ({"loss": "dkd", "data": "synthetic"}, "dkd"),
        ({"loss_warmup": 0.2, "data": "noise"}, "loss_warmup"),
        ({"examples": 64}, "synthetic"),
    ],
)
def test_labels_and_examples_belong_to_the_data(how, words):
    with pytest.raises(Refused, match=words):
        Distill(**how)
    assert Distill(data="noise", alpha=1, loss="dist").config.alpha == Distill(data="noise").config.alpha == 1
