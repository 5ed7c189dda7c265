"""Dynamic integers take their scale from the whole batch: they are judged in the batch of the target."""

import numpy as np
import pytest

import penjing as pj
from penjing.core.artefact import deliver, open_artefact
from penjing.measurement.measure import measure_all
from penjing.measurement.sittings import Effort

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 16)).astype(np.float32) * np.exp(rng.standard_normal((96, 1))).astype(
        np.float32
    )
    y = rng.integers(0, 4, 96)
    return pj.Task(train=(x[:32], y[:32]), valid=(x[32:64], y[32:64]), test=(x[64:], y[64:])).prepare()


@pytest.fixture(scope="module")
def dynamic(task):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    return pj.apply(net, pj.Int8Dynamic(), task).model


@pytest.mark.parametrize("batch", [1, 4])
def test_outputs_are_taken_in_the_batch_of_the_target(dynamic, task, tmp_path, batch):
    target, example = pj.Target(batch=batch), task.valid.example()
    folder = deliver(dynamic, target, tmp_path / "artefact", example=example).path
    artefact = open_artefact(folder)
    assert artefact.facts["batch_dependent"] is True
    assert artefact.evaluation_batch(128) == batch
    x = task.valid.arrays()[0][0]
    found = measure_all({"a": (folder, target, None)}, task, "valid", "a", effort=Effort(0.2))["a"].outputs
    runner = pj.load(folder)
    alike = np.concatenate([runner(x[i : i + batch]) for i in range(0, len(x), batch)])
    np.testing.assert_array_equal(found, alike)
    assert not np.array_equal(found, runner(x)), "the batch matters, else this test shows nothing"


def test_other_files_keep_the_batch_of_the_task(task, tmp_path):
    net = torch.nn.Linear(16, 4)
    artefact = deliver(net, pj.Target(), tmp_path / "artefact", example=task.valid.example())
    assert artefact.evaluation_batch(128) == 128
