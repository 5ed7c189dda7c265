from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import distillation as oracle
from penjing.core.errors import Refused
from penjing.core.kind import Kind
from penjing.train.matching import LOSS_NAMES, MatchingLoss, choose_loss

LABELS = np.array([0, 6, 2, 3, 3])


def reference(match, student, teacher):
    if match.standardize:
        student, teacher = oracle.standardize(student), oracle.standardize(teacher)
    if match.loss == "logits":
        return oracle.hinton_loss(student, teacher, match.temperature)
    if match.loss == "dkd":
        return oracle.decoupled_loss(student, teacher, LABELS, match.balance, match.temperature)
    if match.loss == "dist":
        return oracle.correlation_loss(student, teacher, match.balance, match.temperature)
    if match.loss == "mse":
        return oracle.squared_loss(student, teacher)
    if match.loss == "sigmoid":
        return oracle.sigmoid_loss(student, teacher, match.temperature)
    return oracle.listwise_loss(student, teacher, match.temperature)


def logits(seed=3, shape=(5, 7)):
    return np.random.default_rng(seed).normal(size=shape) * 3


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    "match",
    [
        MatchingLoss("logits", standardize=True),
        MatchingLoss("logits", standardize=False),
        MatchingLoss("dkd", standardize=False, balance=(1.0, 8.0)),
        MatchingLoss("dkd", standardize=True, balance=(0.5, 2.0)),
        MatchingLoss("dist", standardize=False, balance=(2.0, 3.0)),
        MatchingLoss("mse", standardize=False),
        MatchingLoss("ranking", standardize=False),
        MatchingLoss("sigmoid", standardize=False),
    ],
    ids=lambda m: f"{m.loss}-{m.standardize}",
)
def test_losses_agree_with_numpy_and_their_gradients_with_finite_differences(match, temperature):
    match = MatchingLoss(match.loss, temperature, match.standardize, match.balance)
    student, teacher = logits(3), logits(4)
    tensor = torch.tensor(student, requires_grad=True)
    loss = match(tensor, torch.tensor(teacher)[:, None], torch.tensor(LABELS))
    loss.backward()
    assert loss.item() == pytest.approx(reference(match, student, teacher), rel=1e-9)
    for row, column in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[row, column] = 1e-5
        slope = (reference(match, student + step, teacher) - reference(match, student - step, teacher)) / 2e-5
        assert float(tensor.grad[row, column]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("loss", ["logits", "dkd", "dist", "mse"])
def test_rows_that_are_constant_or_extreme_have_finite_gradients(loss):
    student = torch.zeros(3, 4)
    student[1] = torch.tensor([1e4, -1e4, 0, 0])
    student.requires_grad_()
    match = MatchingLoss(loss, 2.0, loss == "logits")
    match(student, torch.randn(3, 1, 4), torch.tensor([0, 1, 2])).backward()
    assert torch.isfinite(student.grad).all()


def test_padding_has_no_gradient_in_a_ranking():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 1, 4)
    teacher[0, 0, 2:] = -torch.inf
    teacher[2, 0, 1:] = -torch.inf
    MatchingLoss("ranking", 1.0, False)(student, teacher, torch.zeros(3)).backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad[0, 2:] == 0).all()
    assert (student.grad[2] == 0).all()
    assert (student.grad[1] != 0).all()


@pytest.mark.parametrize("loss", ["logits", "dkd", "dist", "mse"])
def test_positions_of_tokens_are_rows_and_those_without_a_target_are_left_out(loss):
    student, teacher = (torch.from_numpy(logits(seed, (2, 6, 7))) for seed in (1, 2))
    labels = torch.tensor([[0, 6, 2, -100, -100, -100], [3, 3, -100, -100, -100, -100]])
    match = MatchingLoss(loss, 2.0, loss == "logits")
    found = match(student, teacher[:, None], labels)
    rows = labels != -100
    assert found.item() == pytest.approx(reference(match, *(z[rows].numpy() for z in (student, teacher))))
    first = MatchingLoss(loss, 2.0, loss == "logits", classes_first=True)
    assert first(student.mT, teacher[:, None].mT, labels).item() == pytest.approx(found.item())
    none = match(student.requires_grad_(), teacher[:, None], torch.full_like(labels, -100))
    none.backward()
    assert none.item() == 0
    assert (student.grad == 0).all()


def test_positions_without_labels_of_their_own_all_count():
    student, teacher = (torch.from_numpy(logits(seed, (2, 6, 7))) for seed in (1, 2))
    match = MatchingLoss("logits", 2.0, False)
    found = match(student, teacher[:, None], torch.zeros(2, dtype=torch.long)).item()
    assert found == pytest.approx(reference(match, *(z.flatten(0, 1).numpy() for z in (student, teacher))))


def test_dkd_leaves_out_examples_without_a_label_and_the_others_do_not():
    student, teacher = torch.from_numpy(logits(1)), torch.from_numpy(logits(2))[:, None]
    labels = torch.tensor([0, -100, 2, -100, 3])
    known = labels != -100
    dkd, plain = MatchingLoss("dkd", 2.0, False), MatchingLoss("logits", 2.0, False)
    assert dkd(student, teacher, labels) == dkd(student[known], teacher[known], labels[known])
    assert plain(student, teacher, labels) != plain(student[known], teacher[known], labels[known])


@pytest.mark.parametrize(("loss", "standardize"), [("logits", True), ("dist", False), ("mse", False)])
def test_several_teachers(loss, standardize):
    student, one, two = (logits(seed) for seed in (1, 2, 3))
    weights = (1.0, 3.0)
    match = MatchingLoss(loss, 2.0, standardize, weights=weights)
    found = match(torch.tensor(student), torch.tensor(np.stack([one, two], 1)), torch.tensor(LABELS)).item()
    plain = MatchingLoss(loss, 2.0, False)
    if standardize:
        student, one, two = (oracle.standardize(z) for z in (student, one, two))
    teachers = oracle.softened_mean(np.stack([one, two], 1), np.array(weights), 2.0)
    wanted = (one + 3 * two) / 4 if loss == "mse" else teachers
    assert found == pytest.approx(reference(plain, student, wanted))


def test_labels_of_several_teachers_have_the_mean_of_their_probabilities():
    student, one, two = (torch.from_numpy(logits(seed)) for seed in (1, 2, 3))
    match = MatchingLoss("sigmoid", 2.0, False, weights=(1.0, 3.0))
    probability = ((one / 2).sigmoid() + 3 * (two / 2).sigmoid()) / 4
    mean = (2 * probability.logit()).numpy()
    found = match(student, torch.stack([one, two], 1), torch.tensor(LABELS)).item()
    assert found == pytest.approx(oracle.sigmoid_loss(student.numpy(), mean, 2.0))
    flat = MatchingLoss("sigmoid", 1.0, False)(student[:, 0], one[:, :1], torch.tensor(LABELS)).item()
    assert flat == pytest.approx(oracle.sigmoid_loss(student[:, :1].numpy(), one[:, :1].numpy(), 1.0))


@pytest.mark.parametrize(
    ("kind", "chosen", "refused"),
    [
        (Kind.CLASSES, "logits", ()),
        (Kind.LABELS, "sigmoid", ("logits", "dkd", "dist", "ranking")),
        (Kind.VALUES, "mse", ("logits", "dkd", "dist", "sigmoid")),
    ],
)
def test_what_the_outputs_are_decides_how_they_are_compared(kind, chosen, refused):
    assert choose_loss("auto", kind, (8, 3), (8, 3)) == chosen
    for loss in LOSS_NAMES[1:]:
        if loss not in refused:
            assert choose_loss(loss, kind, (8, 3), (8, 3)) == loss
            continue
        with pytest.raises(Refused, match=r"outputs \(8, 3\), targets \(8, 3\)"):
            choose_loss(loss, kind, (8, 3), (8, 3))


def test_targets_that_do_not_tell_need_a_loss_by_name():
    with pytest.raises(Refused, match="needs targets that tell"):
        choose_loss("auto", Kind.OTHER, (8, 3), (8, 5))
    assert choose_loss("logits", Kind.OTHER, (8, 3), (8, 5)) == "logits"


def refusal(match, student, teachers, labels):
    with pytest.raises(Refused) as caught:
        match(student, teachers, labels)
    assert caught.value.fix
    return str(caught.value)


def test_what_cannot_be_compared_is_refused():
    rows = torch.zeros(4, dtype=torch.long)
    plain = MatchingLoss("logits")
    found = refusal(plain, torch.randn(4, 3), torch.randn(4, 1, 5), rows)
    assert "student (4, 3), teacher (4, 5)" in found
    assert "at least two logits" in refusal(plain, torch.randn(4, 1), torch.randn(4, 1, 1), rows)
    assert "at least two logits" in refusal(plain, torch.randn(4), torch.randn(4, 1), rows)
    found = refusal(MatchingLoss("ranking"), torch.randn(4, 3, 2), torch.randn(4, 1, 3, 2), rows)
    assert "[n, candidates]" in found
    found = refusal(plain, torch.randn(4, 3, 2), torch.randn(4, 1, 3, 2), torch.zeros(4, 5).long())
    assert "(4, 3, 2), labels (4, 5)" in found
    dkd = MatchingLoss("dkd")
    assert "a class index for every row" in refusal(dkd, torch.randn(4, 3), torch.randn(4, 1, 3), rows / 2)
    assert "[0, 2]" in refusal(dkd, torch.randn(4, 3), torch.randn(4, 1, 3), rows + 3)


def test_two_logits_are_not_standardized_which_would_leave_their_signs_only():
    student, teacher = torch.tensor([[0.2, -0.1]], requires_grad=True), torch.tensor([[0.5, 0.4]])
    found = MatchingLoss("logits", 2.0)(student, teacher[:, None], torch.zeros(1))
    expected = oracle.hinton_loss(student.detach().numpy(), teacher.numpy(), 2.0)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-3)
    found.backward()
    assert student.grad[0, 0] > 0, "the teacher is less certain than the student"
    three = MatchingLoss("logits", 2.0)(torch.eye(3), 2 * torch.eye(3)[:, None], torch.zeros(3))
    assert float(three) == pytest.approx(0, abs=1e-6)
