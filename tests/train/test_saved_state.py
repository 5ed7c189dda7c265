"""States of training on disk: all comes back, and a run that ended early goes on to the same weights."""

import math

import pytest
import torch

from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.train.hooks import Hooks
from penjing.train.loop import fit
from penjing.train.objective import make_objective
from penjing.train.saved_state import SavedState
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


class Stop(Exception):
    pass


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "numbers": [1, 2.5, None, True, math.inf, "word"],
        3: (torch.arange(3), {"nested": [torch.tensor(2.0)]}),
        "empty": [],
    }
    SavedState(tmp_path / "state", "key").save(state)
    back = SavedState(tmp_path / "state", "key").load()
    assert back["numbers"] == state["numbers"]
    assert isinstance(back[3], tuple)
    assert torch.equal(back[3][0], torch.arange(3))
    assert back[3][1]["nested"][0] == 2
    assert back["empty"] == []


def test_another_runs_or_a_damaged_state_is_refused(tmp_path):
    path = tmp_path / "state"
    assert SavedState(path, "key").load() is None
    SavedState(path, "key").save({"x": torch.zeros(100)})
    with pytest.raises(Refused, match="of a run with the same model"):
        SavedState(path, "other").load()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(Refused, match="must be complete"):
        SavedState(path, "key").load()
    with pytest.raises(Refused, match="tensors, numbers and words"):
        SavedState(path, "key").save({"x": object()})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer": "adamw", "averaging": "ema", "mixup": 0.2},
        {"optimizer": "schedule_free"},
        {"optimizer": "muon", "averaging": "swa", "sam": 0.05},
        {"optimizer": "prodigy", "averaging": "latest", "shift": 1},
    ],
    ids=str,
)
def test_a_run_that_was_broken_off_ends_with_the_same_weights(net, split, tmp_path, fields):
    if {"muon", "schedule_free", "prodigy"} & set(fields.values()):
        pytest.importorskip("pytorch_optimizer", reason="the extra optimizers is not installed")
    strategy = Strategy(**{"epochs": 2, "batch_size": 50, **fields})
    whole, broken = net(), net()
    wanted = fit(whole, split, LOSS, strategy)

    def run(model, stop_at):
        taken = []

        def after_step(progress):
            taken.append(progress)
            if stop_at is not None and len(taken) > stop_at:
                raise Stop

        saved = SavedState(tmp_path / "state", "key", every=0.0)
        return fit(model, split, LOSS, strategy, hooks=Hooks(after_step=after_step), saved_state=saved)

    for stop_at in (5, 9):
        with pytest.raises(Stop):
            run(broken, stop_at)
        broken = net()
    got = run(broken, None)
    assert (got.steps, got.examples, len(got.losses)) == (wanted.steps, wanted.examples, len(wanted.losses))
    assert got.losses == pytest.approx(wanted.losses, abs=0)
    assert sum("went on from a saved state" in event for event in got.events) == 2
    for (name, a), b in zip(whole.state_dict().items(), broken.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
