from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.backends.torch.distill.feature_losses import attention_scores, relation_loss, score_loss
from penjing.backends.torch.observe.attention_calls import Attending, AttentionCalls


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    parts = {"train": slice(512), "valid": slice(800, 900), "test": slice(1200, 1300)}
    return pj.Task(**{name: (x[part], y[part]) for name, part in parts.items()}).prepare()


HOW = {"batch_size": 32, "optimizer": "adam", "lr": 3e-3}


@pytest.fixture(scope="module")
def teacher(task, tiny_transformer):
    return pj.apply(tiny_transformer(), pj.FineTune(epochs=4, **HOW), task).model.eval()


def attention(model, task, layer=-1):
    network = Attending(model.eval())
    with torch.no_grad():
        network(torch.from_numpy(task.valid.inputs[0]))
    return network.calls[layer]


def gap(student, teacher, task, layer=-1):
    mine, its = attention(student, task, layer), attention(teacher, task)
    return sum(
        float(relation_loss(getattr(mine, k), getattr(its, k), 4, None)) for k in ("query", "key", "value")
    )


@pytest.mark.parametrize("alpha", [None, 0.9, 1.0])
def test_a_narrower_student_takes_over_the_relations(task, teacher, tiny_transformer, alpha):
    student = tiny_transformer(width=16, inner=32, head_width=8, seed=1)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    found = pj.distill(student, teacher, task, pj.DistillRelations(epochs=3, beta=5, alpha=alpha, **HOW))
    assert gap(found.model, teacher, task) < 0.7 * gap(student, teacher, task)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert found.model.state_dict().keys() == student.state_dict().keys()
    assert torch.equal(found.model.fc.weight, student.fc.weight) == (alpha is None)


def test_layers_are_chosen_and_what_is_behind_them_learns_nothing(task, teacher, tiny_transformer):
    student = tiny_transformer(width=16, inner=32, head_width=8, seed=1)
    method = pj.DistillRelations(student_layer=0, alpha=None, heads=4, epochs=1, weight_decay=0, **HOW)
    found = pj.distill(student, teacher, task, method).model
    assert gap(found, teacher, task, 0) < gap(student, teacher, task, 0)
    assert torch.equal(found.body[1].query.weight, student.body[1].query.weight)
    assert not torch.equal(found.body[0].query.weight, student.body[0].query.weight)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.table, self.out, self.mask = nn.Embedding(10, 8), nn.Linear(8, 3), mask

    def forward(self, ids):
        x = self.table(ids)
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=self.mask(ids))
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize(
    "mask",
    [
        lambda ids: (ids > 0)[:, None, None, :],
        lambda ids: torch.where(ids > 0, 0.0, torch.finfo(torch.float32).min)[:, None, None, :],
        lambda ids: ((ids > 0)[:, None, :] & torch.ones(4, 4).tril().bool())[:, None],
    ],
    ids=["keys", "added", "causal"],
)
def test_keys_that_nobody_sees_are_left_out(mask):
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    network = Attending(Masked(mask))
    network(ids)
    (call,) = network.calls
    # Padding neither sees nor is seen.
    assert not call.pairs[0, :, 3].any()
    assert not call.pairs[0, :, :, 3].any()
    assert call.pairs[1, :, 3].all()
    assert call.seen.tolist() == [[True, True, True, False], [True] * 4]
    assert (call.query.shape, call.heads) == ((2, 4, 8), 2)


def test_a_narrower_student_takes_over_the_scores_of_all_its_layers(task, teacher, tiny_transformer):
    student = tiny_transformer(width=16, inner=32, head_width=4, seed=1)
    method = pj.DistillRelations(relation="scores", epochs=3, alpha=None, weight_decay=0, **HOW)
    found = pj.distill(student, teacher, task, method)
    assert found.changes[0].detail["layers"] == "0 to 0, 1 to 1"
    for layer in (0, 1):
        distances = []
        for model in (student, found.model):
            scores = [
                attention_scores(call.query, call.key, 4, call.scale)
                for call in (attention(model, task, layer), attention(teacher, task, layer))
            ]
            distances.append(float(score_loss(*scores, None)))
        assert distances[1] < 0.6 * distances[0]
    # Values and what follows them have no part in scores, but those of the first layer feed the second.
    assert torch.equal(found.model.body[1].value.weight, student.body[1].value.weight)
    assert not torch.equal(found.model.body[0].value.weight, student.body[0].value.weight)


def test_one_pair_of_layers_may_be_named_for_scores(task, teacher, tiny_transformer):
    student = tiny_transformer(width=16, inner=32, head_width=4, seed=1)
    method = pj.DistillRelations(relation="scores", student_layer=0, epochs=0.25, alpha=None, **HOW)
    assert pj.distill(student, teacher, task, method).changes[0].detail["layers"] == "0 to 1"


def test_scores_are_what_attention_takes_the_softmax_of():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    with AttentionCalls() as watch:
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    (call,) = watch.calls
    scores = attention_scores(call.query, call.key, call.heads, call.scale)
    assert call.pairs[0, 3].tolist() == [[True, False, False], [True, True, False], [True] * 3]
    made = scores.masked_fill(~call.pairs, -torch.inf).softmax(-1) @ v.repeat_interleave(2, dim=1)
    assert torch.allclose(made, y, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"heads": 5}, "5 heads, query of 16 and 32"),
        ({"student_layer": 2}, "2 of 2"),
        ({"teacher_layer": -3}, "-3 of 2"),
    ],
)
def test_layers_that_are_not_there_and_heads_that_do_not_divide_are_refused(
    task, teacher, tiny_transformer, how, words
):
    student = tiny_transformer(width=16, inner=32, head_width=8, seed=1)
    with pytest.raises(pj.Refused, match=words):
        pj.distill(student, teacher, task, pj.DistillRelations(**how))


def test_scores_of_other_numbers_of_heads_are_refused_with_both(task, teacher, tiny_transformer):
    student = tiny_transformer(width=16, inner=32, head_width=8, seed=1)
    with pytest.raises(pj.Refused, match="student 2, teacher 4"):
        pj.distill(student, teacher, task, pj.DistillRelations(relation="scores"))


def test_networks_without_attention_other_lengths_and_several_teachers_are_refused(task, teacher):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(pj.Refused, match="-1 of 0"):
        pj.distill(flat, teacher, task, pj.DistillRelations())
    with pytest.raises(pj.Refused, match="2 teachers"):
        pj.distill(teacher, [teacher, teacher], task, pj.DistillRelations())

    class Shorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(32, 10)

        def forward(self, x):
            q = self.out.weight[:1].view(1, 1, 1, 32).expand(len(x), 1, 3, 32)
            return self.out(nn.functional.scaled_dot_product_attention(q, q, q)[:, 0, 0])

    with pytest.raises(pj.Refused, match="3 beside 8"):
        pj.distill(Shorter(), teacher, task, pj.DistillRelations())
