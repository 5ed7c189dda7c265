"""ONNX Runtime as a target: what it writes, and what it refuses."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.backends.onnx.model import OnnxModel
from penjing.core.errors import Exit, Refused
from penjing.core.target import Target, runtime_for
from penjing.targets import onnxruntime as module

RUNTIME = runtime_for(Target())
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
K = np.array([[0], [1], [1]], dtype=np.int64)


def two_inputs(operator: str = "Add", batch: object = "batch") -> OnnxModel:
    """y = (x @ w) + table[k], and a second output."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Gather", ["table", "k"], ["rows"]),
            helper.make_node("Squeeze", ["rows", "axes"], ["row"]),
            helper.make_node(operator, ["h", "row"], ["y"]),
            helper.make_node("Relu", ["y"], ["z"]),
        ],
        "net",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4]),
            helper.make_tensor_value_info("k", TensorProto.INT64, [batch, 1]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [batch, 2]),
        ],
        [
            numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w"),
            numpy_helper.from_array(np.array([[1, 2], [3, 4]], dtype=np.float32), "table"),
            numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"),
        ],
    )
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def expected() -> np.ndarray:
    return X @ np.arange(8, dtype=np.float32).reshape(4, 2) + np.array([[1, 2], [3, 4]], np.float32)[K[:, 0]]


@pytest.fixture
def folder(tmp_path):
    RUNTIME.deliver(two_inputs(), (X[:1], K[:1]), tmp_path)
    return tmp_path


def test_the_facts_name_inputs_outputs_and_opset(tmp_path):
    facts = RUNTIME.deliver(two_inputs(), (X[:1], K[:1]), tmp_path)
    assert facts == {
        "format": "onnx",
        "opset": 18,
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": [None, 4]},
            {"name": "k", "dtype": "int64", "shape": [None, 1]},
        ],
        "outputs": [
            {"name": "y", "dtype": "float32", "shape": [None, 2]},
            {"name": "z", "dtype": "float32", "shape": [None, 2]},
        ],
        "batch_dependent": False,
    }
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_the_runner_takes_inputs_in_order_and_returns_the_first_output(folder):
    runner = RUNTIME.open(folder, Target())
    np.testing.assert_allclose(runner(X, K), expected(), rtol=1e-6)
    np.testing.assert_allclose(runner(X[:1], K[:1]), expected()[:1], rtol=1e-6)
    assert runner.fixed_batch is None


def test_the_fixed_batch_of_a_graph_is_known(tmp_path):
    RUNTIME.deliver(two_inputs(batch=3), (X, K), tmp_path)
    runner = RUNTIME.open(tmp_path, Target())
    assert runner.fixed_batch == 3
    with pytest.raises(Refused, match=r"input 'x'.*\(3, 4\)"):
        runner(X[:2], K[:2])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((X,), "inputs must be 2, as many as the model has, got 1"),
        ((X.astype(np.float64), K), "input 'x'.*float32"),
        ((X, K.astype(np.int32)), "input 'k'.*int64"),
        ((X[:, :3], K), r"input 'x'.*\(batch, 4\)"),
        ((X[0], K), "input 'x'"),
        ((X.tolist(), K), "input 'x' must be a NumPy array, got list"),
        ((X, K[:2]), "must have as many examples each, got 2, 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(folder, inputs, said):
    runner = RUNTIME.open(folder, Target())
    with pytest.raises(Refused, match=said):
        runner(*inputs)
    runner(X, K)


def test_an_index_outside_the_table_is_refused_with_the_runtimes_words(folder):
    with pytest.raises(Refused, match=r"out of data bounds|indices"):
        RUNTIME.open(folder, Target())(X, K + 7)


def test_session_settings():
    options = module.make_session_options(2)
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_session_on_another_provider_is_refused(folder, monkeypatch):
    monkeypatch.setattr(module, "_PROVIDERS", {"cpu": "CUDAExecutionProvider"})
    with pytest.raises(Refused, match="session must run on") as caught:
        RUNTIME.open(folder, Target())
    assert caught.value.code == Exit.ENVIRONMENT


def test_a_session_that_falls_back_silently_is_refused(folder, monkeypatch):
    class Fallback:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["SlowExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(module.ort, "InferenceSession", Fallback)
    with pytest.raises(Refused, match="SlowExecutionProvider"):
        RUNTIME.open(folder, Target())


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_files_are_refused(folder, damage):
    path = folder / "model.onnx"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-40])
    with pytest.raises(Refused, match=r"model\.onnx"):
        RUNTIME.open(folder, Target())
