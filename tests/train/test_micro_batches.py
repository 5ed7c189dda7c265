"""Batches in micro-batches: more where memory lacks, fewer once there is plenty again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.train import micro_batches as module
from penjing.train import stepper
from penjing.train.loop import fit
from penjing.train.micro_batches import LOOK_EVERY, MicroBatches
from penjing.train.objective import make_objective
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


def made(free, asked=1):
    events = []
    return MicroBatches(asked, lambda: free[0], events), events


def test_parts_grow_back_once_twice_the_memory_is_free():
    free = [1_000_000]
    micro_batches, events = made(free)
    assert micro_batches.count(64) == 1
    micro_batches.halve(10, 64, MemoryError())
    micro_batches.halve(10, 64, MemoryError())
    assert micro_batches.count(64) == 4
    free[0] = 1_900_000
    micro_batches.grow(10 + 2 * LOOK_EVERY, 64)
    assert micro_batches.count(64) == 4, "not enough"
    free[0] = 2_000_000
    micro_batches.grow(10 + 3 * LOOK_EVERY, 64)
    assert micro_batches.count(64) == 4, "too early to look again"
    micro_batches.grow(10 + 4 * LOOK_EVERY, 64)
    assert micro_batches.count(64) == 2
    micro_batches.grow(10 + 9 * LOOK_EVERY, 64)
    assert micro_batches.count(64) == 1
    assert events[-2:] == [
        "step 410: 0.002 GB are free again: micro-batches have 32 examples",
        "step 910: 0.002 GB are free again: micro-batches are as asked for",
    ]


def test_parts_that_were_asked_for_stay():
    micro_batches, events = made([1], asked=3)
    assert micro_batches.count(64) == 3
    assert micro_batches.count(2) == 2
    micro_batches.grow(10_000, 64)
    assert micro_batches.count(64) == 3
    assert events == []


def test_a_state_goes_on():
    micro_batches, _ = made([5])
    micro_batches.halve(7, 64, MemoryError())
    again, _ = made([10])
    again.restore(micro_batches.state())
    assert again.count(64) == 2
    again.grow(7 + LOOK_EVERY, 64)
    assert again.count(64) == 1


def test_four_examples_that_do_not_fit_are_refused():
    micro_batches, _ = made([1])
    micro_batches.halve(0, 8, MemoryError())
    with pytest.raises(Refused, match="4 examples that do not"):
        micro_batches.halve(0, 8, MemoryError())


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
    assert any("are free again: micro-batches are as asked for" in event for event in done.events)
