"""Outputs that depend on the batch: found by asking, and judged in the batch that is timed."""

import numpy as np
import pytest

import penjing as pj
from penjing.core.artefact import deliver
from penjing.core.errors import Refused
from penjing.measurement.batch_dependence import batch_dependence, judged_outputs
from penjing.measurement.measure import measure, measure_all
from penjing.measurement.sittings import Effort

RNG = np.random.default_rng(0)
X = RNG.standard_normal((300, 6)).astype(np.float32) + 3
WEIGHT = RNG.standard_normal((6, 4)).astype(np.float32)
Y = ((X - 3) @ WEIGHT).argmax(1)
TASK = pj.Task(train=(X[:30], Y[:30]), valid=(X[60:], Y[60:]), test=(X[30:60], Y[30:60]), batch_size=64)


def batched(function):
    """Run a function batch by batch."""
    return lambda inputs, size: np.concatenate(
        [function(inputs[0][i : i + size]) for i in range(0, len(inputs[0]), size)]
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: np.sort(x, axis=0),
        lambda x: np.round(x / np.abs(x).max() * 3),
        lambda x: x if len(x) < 60 else -x,
    ],
    ids=["mean", "sort", "dynamic scale", "branch"],
)
def test_dependence_on_the_batch_is_measured_and_the_batch_of_the_target_judges(function):
    run = batched(function)
    judged = judged_outputs(run, (X,), usual=64, batch=4)
    assert judged.batches.dependent
    assert judged.batches.difference > 0.1
    assert (judged.batches.batch, judged.batches.n) == (4, 32)
    np.testing.assert_array_equal(judged.outputs, run((X,), 4))
    np.testing.assert_array_equal(judged.usual, run((X,), 64))


def test_what_depends_on_nothing_but_rounding_is_judged_in_the_usual_batch():
    rounding = batched(lambda x: x * (1 + 1e-5 * (len(x) == 1)))
    judged = judged_outputs(rounding, (X,), usual=64, batch=1)
    assert not judged.batches.dependent
    assert 0 < judged.batches.difference < 1e-4
    assert judged.batches.batch == 64
    assert judged.outputs is judged.usual


def test_noise_is_not_taken_for_dependence():
    rng = np.random.default_rng(1)
    noisy = batched(lambda x: x + rng.uniform(-0.1, 0.1, x.shape))
    assert not judged_outputs(noisy, (X,), usual=64, batch=1).batches.dependent


def test_a_model_that_takes_no_single_example_is_compared_in_the_batch_of_the_target():
    def function(x):
        if len(x) == 1:
            raise Refused("must have two examples", value=1, place="batch", fix="give more")
        return x - x.mean(0)

    run = batched(function)
    assert batch_dependence(run, (X,), run((X,), 64), usual=64, batch=4).dependent
    with pytest.raises(Refused, match="must have two examples"):
        judged_outputs(run, (X,), usual=64, batch=1)


@pytest.fixture
def torch(quick):
    return pytest.importorskip("torch")


def linear(torch, bias=True):
    layer = torch.nn.Linear(6, 4, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(WEIGHT.T))
    return layer


def test_a_file_that_takes_its_statistics_from_the_batch_is_judged_as_it_is_timed(torch, tmp_path):
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(6, track_running_stats=False), linear(torch)).eval()
    target = pj.Target("torch", batch=4)
    folder = deliver(net, target, tmp_path / "artefact", example=(X[:1],)).path
    entries = {"net": (folder, target, lambda: net)}
    found = measure_all(entries, TASK, "valid", "net", effort=Effort(0.0))["net"]
    with torch.no_grad():
        alike = [net(torch.from_numpy(X[i : i + 4])).numpy() for i in range(60, 300, 4)]
    np.testing.assert_allclose(found.outputs, np.concatenate(alike), rtol=1e-4, atol=1e-4)
    batches = found.measurement.batches
    assert batches.dependent
    assert batches.batch == 4
    in_small, in_large = (np.mean(o.argmax(1) == Y[60:]) for o in (found.outputs, found.usual))
    assert in_small < in_large - 0.1, "the batch matters, else this test shows nothing"
    assert found.measurement.quality.value == in_small


class Branch:
    """Makes a net that answers wrongly in batches of more than some examples."""

    def __init__(self, torch, more_than):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = linear(torch)

            def forward(self, x):
                y = self.layer(x - 3)
                return -y if x.shape[0] > more_than else y

        self.net = Net().eval()


def test_a_branch_on_the_batch_that_the_export_froze_is_seen_in_the_own_batches(torch):
    found = measure(Branch(torch, more_than=63).net, TASK, seconds=0.0)
    assert found.quality.value > 0.9, "the file always takes the other branch"
    assert found.quality_in_memory < 0.3
    assert found.difference > 0.5


def test_a_model_that_agrees_says_so_with_both_qualities(torch):
    found = measure(linear(torch), TASK, seconds=0.0)
    assert found.difference < 1e-5
    assert found.quality_in_memory == found.quality.value
    assert not found.batches.dependent
    assert found.batches.batch == 64
