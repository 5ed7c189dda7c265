"""Training as a user calls it: curves, goals, patience, and a kill on the way."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
pytest.importorskip("sklearn", reason="the extra metrics is not installed")

from sklearn.datasets import load_digits  # noqa: E402
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.measurement.energy import EnergyMeter  # noqa: E402

QUIET = [].append


def digits():
    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


def task(**fields):
    x, y = digits()
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    own = {"train": (x[:1000], y[:1000]), "valid": (x[1000:1400], y[1000:1400]), "test": (x[1400:], y[1400:])}
    return pj.Task(**(own | fields))


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
        )


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_curve_a_record_and_an_untouched_model():
    model, lines = net(), []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fitted = pj.fit(
        model, task(), pj.Strategy(epochs=4, batch_size=50), say=lambda line: lines.append(str(line))
    )
    record = fitted.record
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [round(point.epoch) for point in record.curve] == [1, 2, 3, 4]
    assert [point.step for point in record.curve] == [20, 40, 60, 80]
    assert record.quality > 0.9
    assert (record.steps, record.examples) == (80, 4000)
    assert record.reached is None
    # Forward: 16 * 9 * 8 + 128 * 10; training takes it three times.
    assert record.multiply_adds == 3 * 4000 * (16 * 9 * 8 + 1280)
    assert record.peak_memory_bytes > 50e6
    assert len(lines) == 4
    assert "accuracy" in lines[0]
    x, y = task().valid
    right = (fitted.model.eval()(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    assert right == pytest.approx(record.quality)


def test_training_ends_at_the_goal():
    fitted = pj.fit(net(), task(), pj.Strategy(epochs=20, batch_size=50), goal="accuracy >= 80%", say=QUIET)
    reached = fitted.record.reached
    assert reached is not None
    assert reached == fitted.record.curve[-1]
    assert reached.quality >= 0.8
    assert fitted.record.steps == reached.step < 400
    assert any("is reached" in event for event in fitted.record.events)


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_what_reached_the_goal_is_what_is_returned(averaging):
    strategy = pj.Strategy(epochs=20, batch_size=50, averaging=averaging)
    record = pj.fit(net(), task(), strategy, goal="accuracy >= 85%", say=QUIET).record
    assert record.reached is not None
    assert record.quality == record.reached.quality


def test_patience_ends_training_with_the_best_weights():
    fitted = pj.fit(net(), task(), pj.Strategy(epochs=60, batch_size=50, patience=2), say=QUIET)
    record = fitted.record
    assert record.steps < 1200
    assert any("training ends with the best evaluation's weights" in event for event in record.events)
    assert record.quality in [point.quality for point in record.curve[:-1]]


def test_the_rate_falls_at_a_plateau():
    fitted = pj.fit(net(), task(), pj.Strategy(epochs=25, batch_size=50, schedule="plateau"), say=QUIET)
    assert fitted.record.steps == 500
    assert any("learning rate divided by 10" in event for event in fitted.record.events)


def test_a_metric_of_ones_own_is_minimized():
    def wrong(outputs, targets):
        return float((outputs.argmax(1) != targets).mean())

    own = task(metric=wrong, direction="minimize")
    fitted = pj.fit(net(), own, pj.Strategy(epochs=6, batch_size=50), goal="wrong <= 0.15", say=QUIET)
    assert fitted.record.reached is not None
    with pytest.raises(pj.Refused, match="minimized"):
        pj.fit(net(), own, goal="wrong >= 0.1", say=QUIET)


def test_bad_arguments_are_refused_before_training():
    with pytest.raises(pj.Refused, match="must be of the task's metric"):
        pj.fit(net(), task(), goal="f1_macro >= 0.9", say=QUIET)
    with pytest.raises(pj.Refused, match=r"penjing\.Strategy"):
        pj.fit(net(), task(), {"epochs": 3}, say=QUIET)
    with pytest.raises(pj.Refused, match="cross_entropy"):
        pj.fit(net(), task(loss=lambda out, y: out.mean()), pj.Strategy(label_smoothing=0.1), say=QUIET)
    with pytest.raises(pj.Refused, match="must be a known value, got 'sdg'"):
        pj.Strategy(optimizer="sdg")


def test_a_finished_folder_is_read_back_and_is_nobody_elses(tmp_path):
    strategy = pj.Strategy(epochs=2, batch_size=50)
    first = pj.fit(net(), task(), strategy, out=tmp_path / "run", say=QUIET)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["fit.json", "weights.safetensors"]
    lines = []
    again = pj.fit(net(), task(), strategy, out=tmp_path / "run", say=lambda line: lines.append(str(line)))
    assert not lines
    assert again.record == first.record
    assert same(first.model, again.model)
    with pytest.raises(pj.Refused, match="must hold the same training run"):
        pj.fit(net(seed=1), task(), strategy, out=tmp_path / "run", say=QUIET)
    weights = tmp_path / "run" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(pj.Refused, match="must be complete"):
        pj.fit(net(), task(), strategy, out=tmp_path / "run", say=QUIET)


DRIVER = """
import os
import runpy
import signal
import penjing as pj
import penjing.train.saved_state as saved_state
own = runpy.run_path({file!r})
net, task = own["net"], own["task"]
saved_state.SavedState.is_due = lambda self, step: True
strategy = pj.Strategy(epochs=30, batch_size=50, averaging="ema", shift=1, patience=9)

def say(line):
    if line.text.startswith("epoch 5:"):
        os.kill(os.getpid(), signal.SIGKILL)

pj.fit(net(), task(), strategy, out={out!r}, say=say)
"""


def test_a_killed_run_goes_on_to_the_same_curve(tmp_path):
    strategy = pj.Strategy(epochs=30, batch_size=50, averaging="ema", shift=1, patience=9)
    whole = pj.fit(net(), task(), strategy, say=QUIET)
    out = tmp_path / "run"
    script = DRIVER.format(file=__file__, out=str(out))
    driver = subprocess.run([sys.executable, "-c", script], check=False)
    assert driver.returncode == -signal.SIGKILL
    assert (out / "training.safetensors").exists()
    assert not (out / "fit.json").exists()
    lines = []
    resumed = pj.fit(net(), task(), strategy, out=out, say=lambda line: lines.append(str(line)))
    assert len(lines) < len(whole.record.curve)
    assert any("went on from a saved state" in event for event in resumed.record.events)
    assert [point.quality for point in resumed.record.curve] == [
        point.quality for point in whole.record.curve
    ]
    assert [point.loss for point in resumed.record.curve] == [point.loss for point in whole.record.curve]
    assert same(whole.model, resumed.model)
    assert json.loads((out / "fit.json").read_text())["record"]["steps"] == whole.record.steps


def test_energy_is_read_where_the_machine_tells_it(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000\n")
    (zone / "energy_uj").write_text("900000\n")
    meter = EnergyMeter(tmp_path)
    (zone / "energy_uj").write_text("950000\n")
    assert meter.joules() == pytest.approx(0.05)
    (zone / "energy_uj").write_text("100000\n")
    assert meter.joules() == pytest.approx(0.2), "the counter began anew"
    assert EnergyMeter(tmp_path / "none").joules() is None


@pytest.mark.parametrize(
    ("fields", "more", "looks"),
    [
        ({}, {}, 2),
        ({"averaging": "ema"}, {}, 3),
        ({}, {"goal": "accuracy >= 50%"}, 1),
        ({"patience": 1, "lr": 1e-6}, {}, 3),
    ],
)
def test_quality_is_that_of_the_model_returned_and_no_look_is_taken_twice(monkeypatch, fields, more, looks):
    from penjing.experiments import monitor

    taken, real = [], monitor.outputs_of

    def counted(*arguments):
        taken.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(monitor, "outputs_of", counted)
    strategy = pj.Strategy(epochs=2, batch_size=50, **fields)
    fitted = pj.fit(net(), task(), strategy, say=QUIET, **more)
    assert len(taken) == looks
    valid = task().prepare().valid
    with torch.no_grad():
        found = fitted.model.eval()(torch.from_numpy(valid.arrays()[0][0])).argmax(1).numpy()
    assert fitted.record.quality == (found == valid.arrays()[1]).mean()
