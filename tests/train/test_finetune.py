from __future__ import annotations

import math
import re

import pytest
from pydantic import ValidationError

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.registry import method_from_json, method_to_json
from penjing.core.task import Task
from penjing.train.finetune import FineTune, fine_tune_torch
from penjing.train.method import TrainingMethod
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
    assert FineTune().strategy.peak_lr == 0.05
    assert FineTune(optimizer="adamw").strategy.peak_lr == 1e-3
    assert FineTune(optimizer="adamw", lr=0.2).strategy.peak_lr == 0.2
    assert issubclass(FineTune, TrainingMethod)


def test_a_strategy_is_given_by_its_fields_or_whole():
    whole = FineTune(strategy=Strategy(epochs=2, optimizer="adamw"))
    assert whole == FineTune(epochs=2, optimizer="adamw")
    assert repr(whole) == "FineTune(epochs=2.0, optimizer='adamw')"
    assert (whole.epochs, whole.optimizer) == (2.0, "adamw")
    assert FineTune(strategy=Strategy(epochs=2), epochs=3) == FineTune(epochs=3), "a single field counts more"
    assert FineTune(epochs=1, lr=0.1).model_copy(update={"epochs": 2.0}) == FineTune(epochs=2, lr=0.1)
    data = method_to_json(whole)
    assert data == {"method": "FineTune"} | Strategy(epochs=2, optimizer="adamw").model_dump(mode="json")
    nested = {"method": "FineTune", "strategy": {"epochs": 2, "optimizer": "adamw"}}
    assert method_from_json(data) == method_from_json(nested) == whole


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epoch": 3}, "FineTune cannot take a field 'epoch'. Did you mean 'epochs'"),
        ({"epochs": 0}, "FineTune.epochs must be greater than 0, got 0"),
        ({"strategy": 3}, "FineTune.strategy must be a Strategy, got 3"),
        ({"strategy": {"epochs": 0}}, "FineTune.epochs must be greater than 0, got 0"),
        ({"strategy": {"epoch": 1}}, "FineTune cannot take a field 'epoch'. Did you mean 'epochs'"),
    ],
)
def test_what_is_wrong_in_a_strategy_is_said_of_the_method(fields, words):
    with pytest.raises(Refused, match=re.escape(words)):
        FineTune(**fields)


def test_a_method_has_no_other_attributes_than_its_own_and_those_of_a_strategy():
    with pytest.raises(AttributeError, match="peak_lr"):
        FineTune().peak_lr  # noqa: B018
    with pytest.raises(ValidationError, match="frozen"):
        FineTune().epochs = 3
