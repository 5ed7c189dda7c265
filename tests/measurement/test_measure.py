"""Measuring delivered artefacts side by side, in processes of their runtimes."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.backends.onnx.model import OnnxModel
from penjing.core.artefact import deliver
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate, Latency, NotMeasured, Operations
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.measurement.agreement import difference
from penjing.measurement.measure import measure, measure_all
from penjing.measurement.quality_interval import quality_of
from penjing.measurement.sittings import Effort
from penjing.measurement.stage import timed_batch

RNG = np.random.default_rng(0)
X = RNG.standard_normal((90, 6)).astype(np.float32)
WEIGHT = RNG.standard_normal((6, 3)).astype(np.float32)
Y = (X @ WEIGHT + 0.3 * RNG.standard_normal((90, 3))).argmax(1)


def classifier(work: int = 0, batch: object = "batch") -> OnnxModel:
    """Logits x @ w, with `work` large products before them that change nothing but the time."""
    nodes, values, last = [], [numpy_helper.from_array(WEIGHT, "w")], "x"
    if work:
        wide = np.zeros((6, 512), np.float32)
        wide[:, :6] = np.eye(6)
        values += [
            numpy_helper.from_array(wide, "widen"),
            numpy_helper.from_array(np.linalg.qr(RNG.standard_normal((512, 512)))[0].astype("f4"), "turn"),
            numpy_helper.from_array(np.ascontiguousarray(wide.T), "narrow"),
        ]
        nodes.append(helper.make_node("MatMul", ["x", "widen"], ["wide"]))
        last = "wide"
        for i in range(work):
            nodes.append(helper.make_node("MatMul", [last, "turn"], [f"t{i}"]))
            last = f"t{i}"
        nodes.append(helper.make_node("Sub", [last, last], ["nothing"]))
        nodes.append(helper.make_node("Add", ["wide", "nothing"], ["same"]))
        nodes.append(helper.make_node("MatMul", ["same", "narrow"], ["back"]))
        last = "back"
    nodes.append(helper.make_node("MatMul", [last, "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        values,
    )
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def a_task(**fields: object) -> Task:
    return Task(train=(X[:30], Y[:30]), valid=(X[30:60], Y[30:60]), test=(X[60:], Y[60:]), **fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("artefacts")
    models = {"plain": classifier(), "heavy": classifier(work=40), "fixed": classifier(batch=1)}
    return {
        name: deliver(model, Target(), parent / name, example=(X[:1],)).path for name, model in models.items()
    }


def test_artefacts_are_measured_side_by_side(folders):
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(WEIGHT.T))
    eager = Target("torch")
    folder = folders["plain"].parent / "eager"
    deliver(linear, eager, folder, example=(X[:1],))
    entries = {
        "plain": (folders["plain"], Target(), None),
        "heavy": (folders["heavy"], Target(), None),
        "eager": (folder, eager, lambda: torch.nn.Linear(6, 3, bias=False)),
    }
    counted = Operations(parameters=18, multiply_adds=18)
    task = a_task(class_names=("a", "b", "c"))
    results = measure_all(entries, task, "test", "plain", {"plain": counted}, effort=Effort(1))
    assert list(results) == ["plain", "heavy", "eager"]
    for name, result in results.items():
        np.testing.assert_allclose(result.outputs, X[60:] @ WEIGHT, rtol=1e-4, atol=1e-5)
        found = result.measurement
        assert (found.name, found.split, found.metric) == (name, "test", "accuracy")
        assert found.quality.value == pytest.approx(np.mean((X[60:] @ WEIGHT).argmax(1) == Y[60:]))
        assert found.quality.low < found.quality.value <= found.quality.high
        assert set(found.per_class) == {"a", "b", "c"}
        assert found.memory_bytes.value > 10_000_000
        assert isinstance(found.latency, Latency)
        assert found.latency.rounds >= 6
    plain, heavy = results["plain"].measurement, results["heavy"].measurement
    assert plain.operations == counted
    assert heavy.operations is None
    assert plain.latency.ratio is None
    assert heavy.latency.ratio.low > 1
    assert heavy.latency.reference == "plain"
    assert (
        heavy.size_bytes
        > 512 * 512 * 4
        > plain.size_bytes
        == (folders["plain"] / "model.onnx").stat().st_size
    )
    assert results["eager"].measurement.target == "torch eager"


def test_what_cannot_be_timed_says_so_and_keeps_its_quality(folders):
    target = Target(batch=4)
    entries = {name: (folders[name], target, None) for name in ("plain", "fixed")}
    results = measure_all(entries, a_task(), "valid", "plain", effort=Effort(0))
    fixed = results["fixed"].measurement
    assert isinstance(fixed.latency, NotMeasured)
    assert "(1, 6)" in fixed.latency.reason
    assert isinstance(fixed.memory_bytes, NotMeasured)
    assert fixed.quality == results["plain"].measurement.quality
    assert results["plain"].measurement.latency.batch == 4


def test_a_reference_that_cannot_be_timed_leaves_no_ratio(folders):
    target = Target(batch=4)
    entries = {name: (folders[name], target, None) for name in ("plain", "fixed")}
    results = measure_all(entries, a_task(), "valid", "fixed", effort=Effort(0))
    assert results["plain"].measurement.latency.ratio is None
    assert results["plain"].measurement.latency.reference == ""


def test_an_unknown_reference_is_refused(folders):
    with pytest.raises(Refused, match=r"got plan\. Did you mean 'plain'"):
        measure_all({"plain": (folders["plain"], Target(), None)}, a_task(), "valid", "plan")


def test_an_unknown_split_is_refused(folders):
    with pytest.raises(Refused, match="train, valid or test"):
        measure(folders["plain"], a_task(), split="prod")


def test_an_artefact_that_does_not_fit_the_data_is_refused(folders):
    parts = [(X[a:b, :5], Y[a:b]) for a, b in ((0, 30), (30, 60), (60, 90))]
    task = Task(train=parts[0], valid=parts[1], test=parts[2])
    with pytest.raises(Refused, match="input 'x'"):
        measure_all({"plain": (folders["plain"], Target(), None)}, task, "valid", "plain")


def test_a_model_is_measured_as_the_file_it_becomes():
    found = measure(classifier(), a_task(), seconds=0.0)
    assert found.target == "onnxruntime"
    assert found.difference < 1e-5
    assert found.operations.multiply_adds == 18
    assert found.size_bytes > 0


def test_a_folder_is_measured_on_its_own_target(folders):
    found = measure(folders["plain"], a_task(), split="test", seconds=0.0)
    assert (found.name, found.split) == ("plain", "test")
    assert isinstance(found.latency, Latency)


def test_the_difference_is_relative_to_the_largest_expected_value():
    expected = np.array([[2.0, -4.0]])
    assert difference(expected + 0.02, expected) == pytest.approx(0.005)
    assert difference(expected, expected) == 0
    assert difference(np.full((1, 2), 0.5), np.zeros((1, 2))) == 0.5
    with pytest.raises(Refused, match="finite"):
        difference(np.array([[np.nan, 1.0]]), expected)
    with pytest.raises(Refused, match="shape"):
        difference(expected[0], expected)


def test_the_timed_batch_repeats_examples_or_draws_other_shapes():
    (batch,) = timed_batch((X[:3],), Target(batch=5))
    np.testing.assert_array_equal(batch, X[[0, 1, 2, 0, 1]])
    other, index = timed_batch((X, Y[:, None]), Target(batch=2, input_shapes=((9,), (4,))))
    assert (other.shape, other.dtype) == ((2, 9), np.float32)
    assert (index.shape, index.dtype) == ((2, 4), Y.dtype)
    assert not index.any()
    with pytest.raises(Refused, match="2 for 1"):
        timed_batch((X,), Target(input_shapes=((9,), (4,))))


def mean_hit(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float((outputs.argmax(1) == targets).mean())


def fussy(outputs: np.ndarray, targets: np.ndarray) -> float:
    if len(np.unique(targets)) < len(targets):
        raise ValueError("needs every target once")
    return 1.0


@pytest.mark.parametrize("metric", ["accuracy", "top2", "f1_macro", mean_hit])
def test_the_interval_of_quality_holds_its_value(metric):
    task = a_task(metric=metric, direction="maximize" if callable(metric) else None)
    logits = X @ WEIGHT
    found = quality_of(task, logits, Y)
    assert isinstance(found, Estimate)
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.25
    assert found.n == 90


def test_a_metric_without_resamples_has_no_interval_and_says_so():
    found = quality_of(a_task(metric=fussy, direction="maximize"), (X @ WEIGHT)[:3], np.array([0, 1, 2]))
    assert isinstance(found, NotMeasured)
    assert "1 but undefined" in found.reason
