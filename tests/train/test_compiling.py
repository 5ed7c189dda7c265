"""Steps are compiled where that pays back, and what was decided is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.core.errors import Exit, Refused
from penjing.core.task import Task
from penjing.train.compiling import COMPILED_STEPS, EAGER_STEPS, Forward, find_obstacle
from penjing.train.loop import fit
from penjing.train.objective import make_objective
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))
X = torch.ones(4, 3)


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that doubles what the call gives, or fails; counts its calls."""
    made = {"compiled": 0, "calls": 0, "fails": None}

    def compile_(call, dynamic):
        assert dynamic is False
        made["compiled"] += 1

        def compiled(*inputs):
            if made["fails"]:
                raise made["fails"]
            made["calls"] += 1
            return 2 * call(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    return made


def record(forward, left, *times):
    """Call once and tell of a step, for each time."""
    for seconds in times:
        forward(X)
        forward.record_step(seconds, left)


def test_nothing_is_compiled_near_the_end(compiler):
    forward = Forward(lambda x: x, "auto")
    record(forward, 500, *[1.0] * 40)
    assert compiler["compiled"] == 0
    assert forward.events == ["not compiled: less than 10 minutes are left"]


def test_compiled_steps_stay_where_they_are_faster_and_what_they_cost_is_said(compiler):
    forward = Forward(lambda x: x, "auto")
    record(forward, 1000, 9.0, 9.0, *[1.0] * (EAGER_STEPS - 2), 50.8, *[0.8] * COMPILED_STEPS)
    (event,) = forward.events
    assert event == (
        "compiled by torch.compile: compiling took 50 s, a step 0.8 s instead of 1 s; "
        "paid back after 250 of 1000 steps"
    )
    assert torch.equal(forward(X), 2 * X)
    assert torch.equal(forward(X[:3]), X[:3]), "another shape is not compiled again"
    assert torch.equal(forward(X.double()), X.double())
    again = Forward(lambda x: x, "auto")
    again.restore(forward.state())
    assert torch.equal(again(X), 2 * X)
    assert again.events == [event]


def test_compiled_steps_go_where_they_are_slower(compiler):
    forward = Forward(lambda x: x, "auto")
    record(forward, 1000, *[1.0] * EAGER_STEPS, 71.0, *[0.99] * COMPILED_STEPS)
    assert forward.events == ["not compiled: compiling took 70 s, a step 0.99 s instead of 1 s"]
    assert torch.equal(forward(X), X)
    again = Forward(lambda x: x, "auto")
    again.restore(forward.state())
    record(again, 1000, *[1.0] * 40)
    assert compiler["compiled"] == 1, "what was decided stays decided"


def test_a_compiler_that_fails_costs_nothing_unless_it_must_not(compiler):
    compiler["fails"] = RuntimeError("no C++ compiler\nwas found")
    forward = Forward(lambda x: x, "auto")
    record(forward, 1000, *[1.0] * 40)
    assert forward.events == ["not compiled: no C++ compiler"]
    assert torch.equal(forward(X), X)
    with pytest.raises(Refused, match="no C\\+\\+ compiler") as refused:
        Forward(lambda x: x, "always")(X)
    assert refused.value.code == Exit.ENVIRONMENT


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"start_size": 0.5}, "start_size changes"),
        ({"stochastic_depth": 0.1}, "stochastic_depth changes"),
        ({"recompute": True}, "recompute changes"),
        ({"sam": 0.05}, "sam changes"),
        ({"ghost_batch": 8}, "ghost_batch changes"),
    ],
)
def test_what_changes_a_step_is_not_compiled(net, fields, reason):
    found = find_obstacle(Strategy(**fields), net(), 1)
    assert found.startswith(reason)
    with pytest.raises(Refused, match=reason):
        Forward(net(), "always", found)


def test_a_recipe_that_cannot_be_compiled_and_must_be_is_refused(net, split):
    with pytest.raises(Refused, match="ghost_batch changes"):
        fit(net(), split, LOSS, Strategy(epochs=0.1, batch_size=50, ghost_batch=10, compile="always"))


def test_watched_layers_and_several_processes_are_not_compiled(net):
    model = net()
    assert find_obstacle(Strategy(), model, 2) == "2 processes train together"
    assert find_obstacle(Strategy(), model, 1) == ""
    model[0].register_forward_hook(lambda *_: None)
    assert find_obstacle(Strategy(), model, 1) == "its layers are watched"
    assert Forward(model, "auto", "its layers are watched").events == ["not compiled: its layers are watched"]


def test_a_real_compiler_trains_to_the_same_weights(split):
    runs = []
    for compile_ in ("never", "always", "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        done = fit(model, split, LOSS, Strategy(epochs=2, batch_size=128, compile=compile_))
        runs.append([parameter.detach().clone() for parameter in model.parameters()])
    assert "not compiled: less than 10 minutes are left" not in done.events, "it ended before it was time"
    for plain, compiled, auto in zip(*runs, strict=True):
        assert torch.allclose(plain, compiled, atol=1e-4)
        assert torch.equal(plain, auto)
