from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import penjing as pj
from oracles import distillation as oracle
from penjing.backends.torch.distill.continuation import (
    OnPolicyStudent,
    Sampling,
    continue_texts,
    mask_predictions,
    sees_future,
)
from penjing.backends.torch.distill.distillation import generalized_divergence
from penjing.core.task import Split, Task

HOW = {"batch_size": 16, "optimizer": "adam", "lr": 0.02, "weight_decay": 0}


def loss(outputs, targets):
    return cross_entropy(outputs.flatten(0, 1), targets.flatten())


def texts(count, seed):
    """Rows of tokens that count up or down, or stay, from anywhere."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([-1, 0, 1], (count, 9), p=[0.2, 0.2, 0.6])
    return (rng.integers(0, 11, (count, 1)) + np.cumsum(steps, axis=1)) % 11


@pytest.fixture(scope="module")
def task():
    def split(name, count, seed):
        ids = texts(count, seed)
        return Split((ids[:, :-1],), ids[:, 1:], name)

    def right(outputs, targets):
        return float((outputs.argmax(-1) == targets).mean())

    names = ("train", "valid", "test")
    splits = {name: split(name, 64 if seed else 256, seed) for seed, name in enumerate(names)}
    return Task(**splits, loss=loss, metric=right, direction="maximize", max_overlap=1).prepare()


@pytest.fixture(scope="module")
def teacher(task, tiny_decoder):
    return pj.apply(tiny_decoder(24), pj.FineTune(epochs=6, **HOW), task).model.eval()


def distance(student, teacher, task, own=True):
    """The divergence of the two, on continuations of the student's own or on texts of the data."""
    ids = torch.from_numpy(task.test.inputs[0])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        ids = continue_texts(student, ids, Sampling(1, 1)) if own else ids
        a, b = (model.eval()(ids)[:, :-1].flatten(0, 1) for model in (student, teacher))
    return float(generalized_divergence(a, b, 1.0))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_divergence_agrees_with_numpy_and_its_gradient_with_finite_differences(beta):
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 5)) * 3
    tensor = torch.tensor(student, requires_grad=True)
    found = generalized_divergence(tensor, torch.tensor(teacher), beta)
    found.backward()
    assert found.item() == pytest.approx(oracle.generalized_divergence(student, teacher, beta), rel=1e-9)
    for row, column in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[row, column] = 1e-5
        ends = (oracle.generalized_divergence(student + sign * step, teacher, beta) for sign in (1, -1))
        slope = (next(ends) - next(ends)) / 2e-5
        assert float(tensor.grad[row, column]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_a_student_follows_on_its_own_texts(task, teacher, tiny_decoder, beta):
    student = tiny_decoder(8, seed=1)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    # Labels that mean nothing: at alpha=1 none is used.
    own = replace(
        task, train=Split(task.train.inputs, np.zeros(256, np.int64), "train"), loss=lambda o, y: o.sum() * 0
    )
    found = pj.distill(student, teacher, own, pj.DistillOnPolicy(epochs=6, on_policy=1, beta=beta, **HOW))
    assert distance(found.model, teacher, task) < 0.5 * distance(student, teacher, task)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert found.model.state_dict().keys() == student.state_dict().keys()
    assert found.changes[0].detail["continued_batches"] == found.changes[0].detail["steps"] == 96


def test_the_share_is_that_of_the_batches_and_without_one_the_data_teach(task, teacher, tiny_decoder):
    student, shares = tiny_decoder(8, seed=1), []
    for share in (0, 0.5):
        method = pj.DistillOnPolicy(epochs=5, on_policy=share, **HOW)
        found = pj.distill(student, teacher, task, method)
        shares.append(found.changes[0].detail["continued_batches"])
        assert distance(found.model, teacher, task, own=False) < 0.6 * distance(
            student, teacher, task, own=False
        )
    assert shares[0] == 0
    assert 25 <= shares[1] <= 55


def test_the_task_teaches_as_far_as_it_is_asked_to(task, tiny_decoder):
    student, blind = tiny_decoder(16, seed=1), tiny_decoder(16, seed=2)

    def lost(alpha):
        found = pj.distill(
            student, blind, task, pj.DistillOnPolicy(epochs=3, on_policy=0.3, alpha=alpha, **HOW)
        )
        return found.changes[0].detail["loss_after"]

    assert lost(0.05) < 2.0 < lost(1.0)


def test_positions_without_a_label_and_prompts_teach_nothing(task, teacher, tiny_decoder):
    student, method = tiny_decoder(8, seed=1), pj.DistillOnPolicy(epochs=1, on_policy=0, prompt=3, **HOW)
    labels = task.train.targets.copy()
    labels[:, 4:] = -100
    masked = replace(task, train=Split(task.train.inputs, labels, "train"), loss=lambda o, y: o.sum() * 0)
    found = pj.distill(student, teacher, masked, method).model
    moved = (found.places - student.places).abs().amax(1) > 0
    # The tokens of the prompt are seen; from the fourth position on nothing is asked.
    assert moved.tolist() == [True] * 4 + [False] * 12
    nothing = replace(masked, train=Split(task.train.inputs, np.full_like(labels, -100), "train"))
    still = pj.distill(student, teacher, nothing, method).model
    assert torch.equal(still.out.weight, student.out.weight)


def test_two_teachers_teach_their_mean(task, teacher, tiny_decoder):
    method = pj.DistillOnPolicy(epochs=0.5, **HOW)
    found = [pj.distill(tiny_decoder(8), t, task, method).model.out.weight for t in (teacher, [teacher] * 2)]
    assert torch.allclose(*found, atol=1e-5)


def test_tokens_are_drawn_by_the_model_from_what_is_before_them(tiny_decoder):
    ids = torch.from_numpy(texts(400, 3))
    model = tiny_decoder(8)
    model.train()
    torch.manual_seed(0)
    found = continue_texts(model, ids, Sampling(1, 4))
    assert torch.equal(found[:, :4], ids[:, :4])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(found), -1)
    said = -log_p[:, 3:-1].gather(-1, found[:, 4:, None]).mean()
    entropy = -(log_p.exp() * log_p).sum(-1)[:, 3:-1].mean()
    assert float(said) == pytest.approx(float(entropy), abs=0.05)
    cold = continue_texts(model, ids, Sampling(1, 4, temperature=1e-3))
    with torch.no_grad():
        likeliest = model(cold)[:, 3:-1].argmax(-1)
    assert (cold[:, 4:] == likeliest).float().mean() > 0.98


def test_a_model_without_finite_probabilities_draws_nothing(tiny_decoder):
    model, ids = tiny_decoder(8), torch.from_numpy(texts(4, 3))
    model.out.bias.data[3] = torch.nan
    assert continue_texts(model, ids, Sampling(1, 4)) is ids


def test_what_is_behind_an_end_does_not_count():
    ids = torch.tensor([[9, 1, 2, 3, 4], [9, 9, 2, 9, 4], [9, 1, 9, 9, 9]])
    assert mask_predictions(ids, Sampling(1, 2)).int().tolist() == [[0, 1, 1, 1, 0]] * 3
    ended = mask_predictions(ids, Sampling(1, 2, end=9)).int().tolist()
    assert ended == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]


def test_in_evaluation_it_is_the_decoder(tiny_decoder):
    ids, model = torch.from_numpy(texts(4, 3)), tiny_decoder(8)
    network = OnPolicyStudent(model, Sampling(1, 1)).eval()
    assert torch.equal(network(ids), model(ids))
    assert (network.batches, network.sampled) == (0, False)
    network.train()(ids)
    assert (network.batches, network.sampled) == (1, True)
    assert not torch.equal(network.ids, ids)


def test_seeing_ahead_is_seen(tiny_decoder):
    ids = torch.from_numpy(texts(1, 3))
    assert not sees_future(tiny_decoder(8), ids, 3)
    assert sees_future(tiny_decoder(8, causal=False), ids, 3)


class Whole(nn.Module):
    """A decoder for eight tokens only."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 11), nn.Parameter(torch.ones(8, 8).tril())

    def forward(self, ids):
        return self.mix @ self.table(ids)


@pytest.mark.parametrize(
    ("student", "how", "words"),
    [
        ("causal", {"prompt": 8}, "longer than the prompt"),
        ("ahead", {}, "student"),
        ("causal", {"end": 11}, "11 of 11"),
        ("whole", {"prompt": 2}, "must run on an example"),
        ("classes", {}, r"student \[1, 11\]"),
    ],
)
def test_what_cannot_be_continued_is_refused(task, teacher, tiny_decoder, student, how, words):
    classes = nn.Sequential(nn.Embedding(11, 4), nn.AdaptiveAvgPool2d((1, 4)), nn.Flatten(), nn.Linear(4, 11))
    found = {
        "causal": tiny_decoder(8),
        "ahead": tiny_decoder(8, causal=False),
        "whole": Whole(),
        "classes": classes,
    }
    with pytest.raises(pj.Refused, match=words):
        pj.distill(found[student], teacher, task, pj.DistillOnPolicy(**how))


def test_masks_numbers_and_labels_of_other_lengths_are_refused(task, teacher, tiny_decoder):
    student, (ids,), labels = tiny_decoder(8), task.train.inputs, task.train.targets

    def told(inputs, targets=labels):
        parts = {name: Split(inputs, targets, name) for name in ("train", "valid", "test")}
        own = replace(task, **parts, loss=lambda o, y: o.sum() * 0)
        with pytest.raises(pj.Refused) as caught:
            pj.distill(student, teacher, own, pj.DistillOnPolicy(epochs=1, on_policy=0, **HOW))
        return str(caught.value)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = student

        def forward(self, ids, mask=None):
            return self.inside(ids.long())

    assert "labels [16, 7]" in told((ids,), labels[:, :7])
    student, teacher = Two(), Two()
    assert "int64[1, 8], int64[1, 8]" in told((ids, ids))
    assert "float32[1, 8]" in told((ids.astype(np.float32),))
