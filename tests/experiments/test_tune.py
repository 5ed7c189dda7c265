"""The search for a strategy as a user calls it, on a small real problem."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
pytest.importorskip("optuna", reason="the extra tune is not installed")
pytest.importorskip("sklearn", reason="the extra metrics is not installed")

from sklearn.datasets import load_digits  # noqa: E402
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.experiments.fit import TrainingJob  # noqa: E402


def task():
    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return pj.Task(train=(x[:1000], y[:1000]), valid=(x[1000:1400], y[1000:1400]), test=(x[1400:], y[1400:]))


def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )


FIELDS = {"goal": "accuracy >= 88%", "time": "12s", "optimizers": ["sgd", "adamw"], "first": 3}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    lines = []
    strategy = pj.Strategy(batch_size=50, shift=1)
    tuned = pj.tune(
        net,
        task(),
        out=tmp_path_factory.mktemp("tune"),
        strategy=strategy,
        say=lambda line: lines.append(str(line)),
        **FIELDS,
    )
    return tuned, lines


def test_a_strategy_that_reaches_the_goal_with_its_model(found):
    tuned, lines = found
    record = tuned.record
    assert record.reached
    assert tuned.strategy.max_seconds is None
    assert tuned.strategy.shift == 1
    assert record.seconds == min(
        run.record.reached.seconds for run in record.runs if run.record and run.record.reached
    )
    x, y = task().test
    right = (tuned.model.eval()(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    assert right == pytest.approx(record.test_quality)
    assert right > 0.8
    assert sum(line.startswith(("sgd: ", "adamw: ")) for line in lines) == 2
    assert tuple(lines) == record.events
    again = pj.fit(tuned.model, task(), tuned.strategy, say=lambda line: lines.append(str(line)))
    assert again.record.quality > 0.85


def test_everything_is_on_disk_and_nothing_is_run_twice(found, monkeypatch):
    tuned, _ = found
    assert json.loads((tuned.folder / "tune.json").read_text()) == tuned.record.model_dump(mode="json")
    assert len(list(tuned.folder.glob("weights-*.safetensors"))) == 1

    def never(*arguments):
        raise AssertionError("a finished run is made again")

    monkeypatch.setattr(TrainingJob, "run", never)
    strategy = pj.Strategy(batch_size=50, shift=1)
    again = pj.tune(net, task(), out=tuned.folder, strategy=strategy, say=[].append, **FIELDS)
    assert again.strategy == tuned.strategy
    assert again.record == tuned.record


def test_the_report_holds_the_curves_and_no_link_to_anywhere(found):
    tuned, _ = found
    page = tuned.report.read_text()
    assert "reached after" in page
    assert 'id="curves"' in page
    assert '"label":"run 1"' in page
    assert "http://" not in page.split("<script>")[0]
    assert "Range tests" in page


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    def stopping(line):
        if line.text.startswith("run 2,"):
            raise KeyboardInterrupt

    strategy = pj.Strategy(batch_size=50)
    with pytest.raises(KeyboardInterrupt):
        pj.tune(net, task(), out=tmp_path, strategy=strategy, say=stopping, **FIELDS)
    made, real = [], TrainingJob.run

    def counted(self, *arguments):
        made.append(self.strategy)
        return real(self, *arguments)

    monkeypatch.setattr(TrainingJob, "run", counted)
    tuned = pj.tune(net, task(), out=tmp_path, strategy=strategy, say=[].append, **FIELDS)
    assert 0 < len(made) <= len(tuned.record.runs) - 2, "a run that is proposed twice is made once"
    assert not any(run.strategy in made for run in tuned.record.runs[:2])


def test_of_equal_runs_the_first_is_chosen_whose_weights_were_kept(monkeypatch, tmp_path):
    """Equal qualities are common on small valid splits; no later run's weights are written then."""
    same = pj.fit(net(), task(), pj.Strategy(epochs=0.1), say=[].append).record
    monkeypatch.setattr(TrainingJob, "run", lambda self, *arguments: same.model_copy())
    fields = FIELDS | {"goal": "accuracy >= 99.9%", "time": "2s"}
    tuned = pj.tune(net, task(), out=tmp_path, say=[].append, **fields)
    assert (tuned.record.best, tuned.record.reached) == (0, False)
    assert [path.name for path in tmp_path.glob("weights-*")] == [tuned.record.runs[0].weights]


def test_bad_arguments_are_refused_before_anything_is_made(tmp_path):
    out = tmp_path / "new"
    fields = FIELDS | {"out": out}
    for wrong, rule in (
        ({"goal": "accuracy > 3"}, "goal must read as metric"),
        ({"goal": "f1_macro >= 0.9"}, "must be of the task's metric"),
        ({"time": "12"}, "must have a unit"),
        ({"optimizers": ["sdg"]}, "must name known optimizers"),
        ({"first": 2}, "tune.first must be at least 3"),
    ):
        with pytest.raises(pj.Refused, match=rule):
            pj.tune(net, task(), **(fields | wrong))
    with pytest.raises(pj.Refused, match="a function that makes one"):
        pj.tune("resnet18", task(), **fields)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(pj.Refused, match="can be written"):
        pj.tune(net, task(), **fields)
