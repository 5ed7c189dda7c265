"""Who died in a comparison is looked at, and the caller's limits hold."""

import os
import signal

import numpy as np
import pytest

import penjing as pj
from penjing.core.artefact import deliver
from penjing.core.errors import Exit
from penjing.core.executor import Limits
from penjing.measurement.measure import measure_all
from penjing.measurement.process import Lost
from penjing.measurement.sittings import Effort

X = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
Y = (X.sum(1) > 0).astype(int)
TASK = pj.Task(train=(X[:10], Y[:10]), valid=(X[10:20], Y[10:20]), test=(X[20:], Y[20:]))
TARGET = pj.Target("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("stage") / "artefact"
    return deliver(torch.nn.Linear(4, 2), TARGET, path, example=(X[:1],)).path


def well():
    import torch

    return torch.nn.Linear(4, 2)


class Signalled:
    """Makes the module in a process that gets a signal when it has run some batches."""

    def __init__(self, number, after):
        self.number, self.after = number, after

    def __call__(self):
        import torch

        number, after = self.number, self.after

        class Net(torch.nn.Linear):
            runs = 0

            def forward(self, x):
                Net.runs += 1
                if Net.runs > after:
                    os.kill(os.getpid(), number)
                return super().forward(x)

        return Net(4, 2)


@pytest.mark.parametrize("after", [0, 60], ids=["while it is judged", "while it is timed"])
def test_the_death_of_the_reference_is_a_fault_of_the_environment(folder, quick, after):
    entries = {
        "float": (folder, TARGET, Signalled(signal.SIGKILL, after)),
        "candidate": (folder, TARGET, well),
    }
    with pytest.raises(pj.Refused, match="the reference must survive its measurement") as caught:
        measure_all(entries, TASK, "valid", "float", effort=Effort(0.0))
    assert caught.value.code == Exit.ENVIRONMENT
    assert "signal 9" in str(caught.value)


def test_the_death_of_a_candidate_is_its_own(folder, quick):
    entries = {"float": (folder, TARGET, well), "candidate": (folder, TARGET, Signalled(signal.SIGKILL, 0))}
    with pytest.raises(Lost, match="must survive") as caught:
        measure_all(entries, TASK, "valid", "float", effort=Effort(0.0))
    assert caught.value.code == Exit.BAD_INPUT
    entries["candidate"] = (folder, TARGET, Signalled(signal.SIGKILL, 60))
    found = measure_all(entries, TASK, "valid", "float", effort=Effort(0.0))
    assert "signal 9" in found["candidate"].measurement.latency.reason
    assert found["float"].measurement.latency.calls > 0


def test_alone_a_death_is_the_artefact_s_own(folder, quick):
    with pytest.raises(Lost):
        measure_all({"a": (folder, TARGET, Signalled(signal.SIGKILL, 0))}, TASK, "valid", "a")


def test_a_candidate_that_is_stopped_takes_no_longer_than_the_caller_says(folder, quick):
    entries = {"float": (folder, TARGET, well), "candidate": (folder, TARGET, Signalled(signal.SIGSTOP, 0))}
    with pytest.raises(Lost, match="no answer to time in 20 s"):
        measure_all(entries, TASK, "valid", "float", effort=Effort(0.0), limits=Limits(seconds=20))
