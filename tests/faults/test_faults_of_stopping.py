"""Faults 54, 55, 59, 60, 62, 63: a run that is stopped, resumed with something else, or disturbed."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import penjing as pj
from penjing.core.backend import backend_for
from penjing.core.errors import Exit, Refused
from penjing.planners.bisection import Bisection
from penjing.search.identity import Question, identify

PENJING = str(Path(sys.executable).with_name("penjing"))
SOURCE = Path(pj.__file__).parent


def stopped(task_file, out, phase, *signals):
    """Start a run, send signals once it says that a phase began, and return code and stderr."""
    line = [PENJING, "optimize", str(task_file), "--max-drop", "5%", "--size", "40%", "--out", str(out)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    said = ""
    while phase not in said:
        text = process.stderr.readline()
        assert text, said
        said += text
    family = psutil.Process(process.pid).children(recursive=True)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    rest = process.communicate(timeout=120)[1]  # hangs, if it takes so long
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, "no orphans"
    return process.returncode, said + rest


@pytest.mark.parametrize(
    ("phase", "signals"),
    [
        ("looking at the model", [signal.SIGINT]),
        ("measuring the original", [signal.SIGINT, signal.SIGINT]),
        ("measuring the original", [signal.SIGTERM]),
        ("trying", [signal.SIGINT]),
        ("trying", [signal.SIGTERM, signal.SIGTERM]),
    ],
)
def test_a_stopped_run_says_how_to_go_on_and_leaves_no_process(task_file, tmp_path, phase, signals, command):
    out = tmp_path / "run 1"
    code, said = stopped(task_file, out, phase, *signals)
    assert code == Exit.INTERRUPTED, said
    assert f"penjing resume '{out}'" in said
    assert "Traceback" not in said
    assert not list(out.rglob("*.tmp"))
    status = command("status", out)
    assert status.returncode == 0, status.stderr
    assert "interrupted" in status.stdout


class Stop(list):
    """Listens, and stops the run at a line."""

    def __init__(self, at):
        self.at = at

    def append(self, line):
        super().append(line)
        if line.startswith(self.at):
            raise KeyboardInterrupt


def changed(model):
    model.tensors["fc"]["weight"][0, 0] += 1
    return model


def test_a_run_is_not_resumed_with_anything_else(optimize, tiny):
    with pytest.raises(KeyboardInterrupt):
        optimize(said=Stop("looking"))
    x, y = tiny["data"]()
    other = pj.Task(train=(x[:300], y[:300]), valid=(x[300:600], y[300:600]), test=(x[601:], y[601:]))
    for different, words in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"budget": {"size": "30%", "trials": 2}}, "budget was"),
        ({"task": other}, "data was"),
        ({"model": changed(tiny["model"]())}, "model was"),
        ({"target": pj.Target("onnxruntime", threads=2)}, "target was"),
        ({"first": 0.25}, "planner was"),
    ):
        with pytest.raises(Refused, match="resumed with what it was started with") as refused:
            optimize(**different)
        assert words in str(refused.value)
        assert str(refused.value.value).count(" was ") == 1, "only what differs is named"
        assert "--out" in refused.value.fix


def right(outputs, targets):
    return float(np.mean(outputs.argmax(1) == targets))


def constant(outputs, targets):
    return 1.0


def test_a_run_is_not_resumed_with_another_question(optimize, tiny):
    """All that a verdict depends on, callables by what they do: else a constant metric says "reached"."""
    with pytest.raises(KeyboardInterrupt):
        optimize(task=tiny["task"](metric=right, direction="maximize"), said=Stop("looking"))
    same = {"metric": right, "direction": "maximize"}
    for different, name in (
        ({"metric": constant}, "metric"),
        ({"direction": "minimize"}, "direction"),
        ({"batch_size": 64}, "batch_size"),
        ({"loss": lambda outputs, targets: outputs.sum()}, "loss"),
        ({"class_names": tuple("abcde")}, "class_names"),
        ({"metric_range": (0.0, 1.0)}, "metric_range"),
    ):
        with pytest.raises(Refused, match="resumed with what it was started with") as refused:
            optimize(task=tiny["task"](**(same | different)))
        assert refused.value.value.startswith(f"{name} was "), refused.value.value
        assert refused.value.value.count(" was ") == 1, "only what differs is named"


def test_another_output_is_another_question(tiny):
    backend = backend_for(tiny["model"]())

    def asked(output):
        task = tiny["task"](output=output).prepare()
        question = Question(tiny["model"](), task, pj.Budget(size="40%"), pj.Target(), 0, Bisection())
        return identify(question, backend).sha256

    found = [asked(output) for output in (None, 0, 1, "logits", lambda out: out[0], lambda out: out[1])]
    assert len(set(found)) == len(found)
    assert asked(lambda other: other[1]) == found[-1]


def test_what_a_metric_holds_that_cannot_be_read_is_noted(optimize, tiny):
    generator = np.random.default_rng(0)

    def noisy(outputs, targets):
        return right(outputs, targets) + 0 * generator.random()

    task = tiny["task"](metric=noisy, direction="maximize")
    notes = optimize(task=task, budget={"size": "200%"}).record["notes"]
    assert any(note.startswith("task.metric holds what cannot be read (numpy.random") for note in notes)


def test_a_listener_that_fails_is_left_alone_and_the_run_goes_on(optimize):
    class Broken(list):
        def append(self, line):
            super().append(line)
            raise OSError("the terminal is gone")

    broken = Broken()
    with pytest.warns(UserWarning, match="OSError: the terminal is gone; it is not called again"):
        result = optimize(said=broken, budget={"size": "200%"})
    assert len(broken) == 1
    assert result.verdict.status == "reached"


def test_a_metric_that_writes_to_its_arguments_changes_nothing(optimize, tiny):
    def greedy(outputs, targets):
        value = float(np.mean(outputs.argmax(1) == targets))
        outputs[:] = 0
        targets[:] = 1
        return value

    task = tiny["task"](metric=greedy, direction="maximize")
    record = optimize(task=task, budget={"size": "200%"}).record
    assert record["result"]["quality"]["value"] == record["result"]["metrics"]["accuracy"] > 0.9
    assert not any("does not react" in note for note in record["notes"])
    assert (task.test[1] == tiny["data"]()[1][600:]).all()


def test_time_is_taken_from_the_monotonic_clock_only(optimize, monkeypatch):
    """A clock that jumps back at every look changes no duration and no answer."""
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    record = optimize(budget={"size": "200%", "time": "60s"}).record
    assert record["verdict"]["limits"]["time"]["status"] == "reached"
    assert 0 < record["spent"]["seconds"] < 60
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"\btime\.time\(|datetime\.now\(\)|utcnow", path.read_text()), path
