"""Faults 31 and 36 as whole runs: metrics that do not react or raise, examples that cannot be read."""

import numpy as np
import pytest

import penjing as pj
from penjing.core.errors import Refused


def always(outputs, targets):
    return 0.75


def never(outputs, targets):
    raise ZeroDivisionError("no positives")


def test_a_metric_that_does_not_react_is_said_in_the_record(optimize, tiny):
    task = tiny["task"](metric=always, direction="maximize")
    record = optimize(task=task, budget={"size": "200%"}).record
    assert any("metric always does not react" in note for note in record["notes"])


def test_a_metric_that_raises_ends_the_run_before_the_search(optimize, tiny):
    said = []
    task = tiny["task"](metric=never, direction="maximize")
    with pytest.raises(Refused, match=r"metric never must return a number.*ZeroDivisionError: no pos"):
        optimize(task=task, said=said)
    assert not any(line.startswith("trying") for line in said)


class Pictures:
    """A data set of files, of which one is missing."""

    def __init__(self, tiny, broken):
        self.inputs, self.labels = tiny["data"]()
        self.broken = broken

    def __len__(self):
        return 300

    def __getitem__(self, index):
        if index == self.broken:
            raise FileNotFoundError(f"照片/{index}.png")
        return self.inputs[index], self.labels[index]


def test_an_example_that_cannot_be_read_stops_the_run_before_it_starts(optimize, tiny, tmp_path):
    x, y = tiny["data"]()
    task = pj.Task(train=(x[:300], y[:300]), valid=Pictures(tiny, 7), test=(x[600:], y[600:]))
    with pytest.raises(Refused, match=r"task\.valid, example 7.*FileNotFoundError: 照片/7\.png"):
        optimize(task=task)
    assert not (tmp_path / "run").exists()


def test_outputs_that_are_not_finite_are_never_scored(optimize, tiny):
    model = tiny["model"]()
    model.tensors["head"]["weight"][:] = np.float32(3e38)
    with np.errstate(over="ignore"), pytest.raises(Refused, match="finite"):
        optimize(model=model)
