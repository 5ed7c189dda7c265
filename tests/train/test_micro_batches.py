"""Batches in parts: more where memory lacks, fewer once there is plenty again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.train import micro_batches as module
from penjing.train import stepper
from penjing.train.loop import fit
from penjing.train.micro_batches import LOOK_EVERY, Parts
from penjing.train.objective import task_objective
from penjing.train.strategy import Strategy

LOSS = task_objective(Task(train=None))


def made(free, asked=1):
    events = []
    return Parts(asked, lambda: free[0], events), events


def test_parts_grow_back_once_twice_the_memory_is_free():
    free = [1_000_000]
    parts, events = made(free)
    assert parts.count(64) == 1
    parts.halve(10, 64, MemoryError())
    parts.halve(10, 64, MemoryError())
    assert parts.count(64) == 4
    free[0] = 1_900_000
    parts.look(10 + 2 * LOOK_EVERY, 64)
    assert parts.count(64) == 4, "not enough"
    free[0] = 2_000_000
    parts.look(10 + 3 * LOOK_EVERY, 64)
    assert parts.count(64) == 4, "too early to look again"
    parts.look(10 + 4 * LOOK_EVERY, 64)
    assert parts.count(64) == 2
    parts.look(10 + 9 * LOOK_EVERY, 64)
    assert parts.count(64) == 1
    assert events[-2:] == [
        "step 410: 0.002 GB are free again: batches are summed from parts of 32 examples",
        "step 910: 0.002 GB are free again: batches are as they were",
    ]


def test_parts_that_were_asked_for_stay():
    parts, events = made([1], asked=3)
    assert parts.count(64) == 3
    assert parts.count(2) == 2
    parts.look(10_000, 64)
    assert parts.count(64) == 3
    assert events == []


def test_a_state_goes_on():
    parts, _ = made([5])
    parts.halve(7, 64, MemoryError())
    again, _ = made([10])
    again.restore(parts.state())
    assert again.count(64) == 2
    again.look(7 + LOOK_EVERY, 64)
    assert again.count(64) == 1


def test_four_examples_that_do_not_fit_are_refused():
    parts, _ = made([1])
    parts.halve(0, 8, MemoryError())
    with pytest.raises(Refused, match="4 examples do not"):
        parts.halve(0, 8, MemoryError())


def test_training_takes_whole_batches_again(split, monkeypatch):
    free, sizes = [1_000], []
    monkeypatch.setattr(stepper, "free_memory", lambda device: free[0])
    monkeypatch.setattr(module, "LOOK_EVERY", 4)

    def objective(outputs, inputs, targets):
        sizes.append(len(targets))
        if free[0] < 2_000 and len(targets) > 25:
            raise torch.OutOfMemoryError("stub")
        if len(sizes) == 5:
            free[0] = 2_000
        return LOSS(outputs, inputs, targets)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    done = fit(model, split, objective, Strategy(epochs=0.5, batch_size=50))
    assert sizes == [50, 25, 25, 25, 25, 25, 25, 25, 25, 50, 50]
    assert any("are free again: batches are as they were" in event for event in done.events)
