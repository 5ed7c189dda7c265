from __future__ import annotations

import math

import pytest

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.train.finetune import FineTune, fine_tune_torch
from penjing.train.strategy import Strategy


def surroundings(task, **fields):
    return Context(task=task, backend=None, original=None, **fields)


def test_reports_one_change_and_notes(net, split):
    said = []
    context = surroundings(Task(train=split, batch_size=50), say=lambda line: said.append(str(line)))
    model = net()
    model.eval()
    done = fine_tune_torch(model, FineTune(epochs=2), context)
    fine_tune_torch(model, FineTune(epochs=0.1), context)
    assert done.model is model
    assert not model.training
    (change,) = done.changes
    assert (change.method, change.layer, change.status) == ("FineTune", "*", "done")
    assert change.detail["steps"] == 24
    assert change.detail["loss_after"] < 0.5 * change.detail["loss_before"]
    assert context.notes["training_s"] > change.detail["seconds"] - 1e-3
    assert len(context.notes["events"]) == 2
    assert said[0].startswith("FineTune: epoch 1 of 2: loss ")


def test_the_recipes_batch_size_wins_over_the_tasks(net, split):
    context = surroundings(Task(train=split, batch_size=50))
    done = fine_tune_torch(net(), FineTune(epochs=1, batch_size=100), context)
    assert done.changes[0].detail["steps"] == 6


def test_a_loss_that_is_not_finite_afterwards_is_refused(net, split):
    calls = []

    def loss(outputs, targets):
        calls.append(0)
        return outputs.square().mean() + (math.nan if len(calls) > 8 else 0)

    context = surroundings(Task(train=split, batch_size=150, loss=loss))
    with pytest.raises(Refused, match="finite after training"):
        fine_tune_torch(net(), FineTune(epochs=1), context)


def test_default_rates_follow_the_optimizer():
    assert FineTune().rate == 0.05
    assert FineTune(optimizer="adamw").rate == 1e-3
    assert FineTune(optimizer="adamw", lr=0.2).rate == 0.2
    assert issubclass(FineTune, Strategy)
