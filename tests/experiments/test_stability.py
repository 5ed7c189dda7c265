"""What chance does to a procedure; the procedures here only pretend to train."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

import penjing as pj  # noqa: E402
from penjing.arrays.spread import equal_quality_p_value  # noqa: E402
from penjing.cli.stability import _show  # noqa: E402
from penjing.core.errors import Exit  # noqa: E402
from penjing.core.executor import Finished, refusal_of  # noqa: E402


def task(**fields):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 6)).astype(np.float32)
    y = (x[:, 0] + 0.7 * rng.standard_normal(600) > 0).astype(np.int64)
    parts = {"train": slice(100), "valid": slice(100, 200), "test": slice(200, 600)}
    return pj.Task(**{name: (x[part], y[part]) for name, part in parts.items()}, **fields)


def with_weights(first, seed):
    """A linear classifier that is right where the first input tells it, but for a little noise."""
    model = torch.nn.Linear(6, 2, bias=False)
    rng = np.random.default_rng(seed)
    weights = 0.15 * rng.standard_normal(6)
    weights[0] = first
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(np.stack([-weights, weights])))
    return model


def sound(task, seed):
    return with_weights(1.0, seed)


def fragile(task, seed):
    return with_weights(0.05 if seed == 2 else 1.0, seed)


class Bent(torch.nn.Linear):
    """Wrong about the few inputs of which the others are surest."""

    def forward(self, x):
        scores = super().forward(x)
        return torch.where(x[:, :1] > 1.9, -scores, scores)


def bent(task, seed):
    model = with_weights(1.0, 0)
    if seed == 2:
        model.__class__ = Bent
    return model


def diverging(task, seed):
    if seed == 1:
        raise pj.Refused("the loss must stay finite", value="loss nan at step 7", fix="lower the rate")
    return with_weights(1.0, seed)


def breaking(task, seed):
    if seed == 1:
        raise pj.Refused("a training step fits in memory", fix="free memory", code=Exit.ENVIRONMENT)
    return with_weights(1.0, seed)


def squared(outputs, targets):
    return float(np.mean((outputs[:, 1] - targets) ** 2))


class Here:
    """Runs jobs in this process: a process each is what takes the time."""

    def __init__(self, payload, **settings):
        self.payload = payload

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def run(self, job, *arguments, limits, name):
        try:
            return Finished(status="done", value=job(self.payload, print, *arguments), seconds=0.0)
        except pj.Refused as refused:
            return Finished(status="refused", refusal=refusal_of(refused), seconds=0.0)


def run(procedure, out, lines=None, seeds=4, **fields):
    say = ([] if lines is None else lines).append
    return pj.stability(
        procedure, task(**fields), seeds=seeds, corruptions=False, out=out, workers=1, say=say
    )


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr("penjing.experiments.stability.LocalExecutor", Here)


@pytest.fixture
def results(here, tmp_path):
    return {
        procedure.__name__: run(procedure, tmp_path / procedure.__name__)
        for procedure in (sound, fragile, diverging)
    }


def test_a_sound_procedure_spreads_as_test_examples_explain(results):
    one = results["sound"].tasks["data"]
    assert len(set(one.values)) > 1
    assert 0.2 < one.spread / one.sampling < 2
    assert not one.unstable
    assert 0 < one.flips < 0.2
    assert one.worst == min(one.values)


def test_one_bad_seed_is_flagged(results, capsys):
    one = results["fragile"].tasks["data"]
    assert one.spread > 3 * one.sampling
    assert one.unstable
    assert one.worst == one.values[2] < 0.75
    _show(results["fragile"].model_dump(mode="json"))
    out = capsys.readouterr().out
    assert "unstable: seeds differ by more than test examples explain, and by more than a tenth" in out
    assert f"explain {one.sampling:.4f}" in out


def test_a_seed_that_diverges_is_flagged_and_named(results, capsys):
    found = results["diverging"]
    one = found.tasks["data"]
    assert one.values[1] is None
    assert None not in (one.values[0], *one.values[2:])
    assert one.unstable
    assert one.spread < 3 * one.sampling
    assert len(found.events) == 1
    assert "seed 1: The loss must stay finite" in found.events[0]
    _show(found.model_dump(mode="json"))
    out = capsys.readouterr().out
    assert "unstable: training gave no model with 1 of 4 seeds" in out
    assert "event: data, seed 1: The loss must stay finite" in out
    with pytest.raises(pj.Refused, match="every seed must have a value"):
        results["sound"].against(found)


def test_a_run_that_breaks_down_is_no_result(here, tmp_path):
    with pytest.raises(pj.Refused, match="every run must come to its end"):
        run(breaking, tmp_path)


def test_metrics_that_are_no_mean_take_the_bootstrap(here, tmp_path):
    one = run(sound, tmp_path, metric=squared, direction="minimize").tasks["data"]
    assert one.worst == max(one.values)
    x, y = task().test
    outputs = sound(None, 0)(torch.from_numpy(x)).detach().numpy()
    error = np.std((outputs[:, 1] - y) ** 2) / np.sqrt(len(y))
    assert one.sampling == pytest.approx(error, rel=0.6)
    assert not one.unstable
    assert run(fragile, tmp_path / "fragile", metric=squared, direction="minimize").tasks["data"].unstable


def test_a_difference_that_is_certain_but_small_is_not_flagged(here, tmp_path):
    one = run(bent, tmp_path).tasks["data"]
    assert equal_quality_p_value(one.spread, one.sampling, 4) < 0.001
    assert one.spread < 0.1 * (1 - one.mean)
    assert not one.unstable


def test_runs_of_other_processes_are_the_same_and_are_read_back(tmp_path, monkeypatch):
    lines = []
    found = run(sound, tmp_path, lines, seeds=2)
    assert len(lines) == 2
    assert run(sound, tmp_path, lines, seeds=2) == found
    assert len(lines) == 2
    assert json.loads((tmp_path / "stability.json").read_text()) == found.model_dump(mode="json")
    monkeypatch.setattr("penjing.experiments.stability.LocalExecutor", Here)
    assert run(sound, tmp_path / "here", seeds=2) == found


def test_procedures_are_told_apart_seed_by_seed(results):
    found = results["sound"].against(results["fragile"])["data"]
    assert found.explained
    assert found.mean < 0
    with pytest.raises(pj.Refused, match="must be at least two"):
        pj.stability(sound, task(), seeds=1, out="nowhere")
