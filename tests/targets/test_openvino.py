"""OpenVINO as a target: what it writes, what it runs in which precision, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("openvino", reason="the extra openvino is not installed")

import penjing as pj
from penjing.backends.onnx.integers.stated import STEP, find_integer_layers, measure_rounding_noise
from penjing.backends.onnx.model import OnnxModel
from penjing.core.artefact import open_artefact
from penjing.core.errors import Exit, Refused
from penjing.core.target import Target, runtime_for
from penjing.targets import openvino as module

F32, BF16 = Target("openvino"), Target("openvino", mode="bf16")
RUNTIME = runtime_for(F32)
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
K = np.array([[0], [1], [1]], dtype=np.int64)

needs_bf16 = pytest.mark.skipif("bf16" not in module.list_float_precisions(), reason="no bfloat16 here")


def two_inputs(operator: str = "Add", batch: object = "batch") -> OnnxModel:
    """y = (x @ w) + table[k], and a second output."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Gather", ["table", "k"], ["rows"]),
            helper.make_node("Squeeze", ["rows", "axes"], ["row"]),
            helper.make_node(operator, ["h", "row"], ["y"]),
            helper.make_node("Relu", ["y"], ["z"]),
        ],
        "net",
        [value("x", TensorProto.FLOAT, [batch, 4]), value("k", TensorProto.INT64, [batch, 1])],
        [value("y", TensorProto.FLOAT, [batch, 2]), value("z", TensorProto.FLOAT, [batch, 2])],
        [
            numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w"),
            numpy_helper.from_array(np.array([[1, 2], [3, 4]], dtype=np.float32), "table"),
            numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"),
        ],
    )
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def one_node(operator: str) -> OnnxModel:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])],
        "net",
        [value("x", TensorProto.FLOAT, ["batch", 2, 2])],
        [value("y", TensorProto.FLOAT, ["batch"])],
    )
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def expected() -> np.ndarray:
    return X @ np.arange(8, dtype=np.float32).reshape(4, 2) + np.array([[1, 2], [3, 4]], np.float32)[K[:, 0]]


@pytest.fixture
def folder(tmp_path):
    RUNTIME.deliver(two_inputs(), (X[:1], K[:1]), tmp_path)
    return tmp_path


def test_the_facts_name_inputs_outputs_and_no_integers(tmp_path):
    facts = RUNTIME.deliver(two_inputs(), (X[:1], K[:1]), tmp_path)
    assert facts == {
        "format": "openvino",
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
        "integer_layers": [],
        "float_layers": {},
        "changes": [],
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_weights_keep_their_type(folder):
    weights = np.arange(8, dtype=np.float32).tobytes()
    assert weights in (folder / "model.bin").read_bytes()


def test_the_runner_takes_inputs_in_order_and_returns_the_first_output(folder):
    runner = RUNTIME.open(folder, F32)
    np.testing.assert_allclose(runner(X, K), expected(), rtol=1e-6)
    np.testing.assert_allclose(runner(X[:1], K[:1]), expected()[:1], rtol=1e-6)
    np.testing.assert_allclose(runner(np.asfortranarray(X), K), expected(), rtol=1e-6)
    assert runner.fixed_batch is None


def test_arrays_that_cannot_be_shared_are_copied_for_the_whole_call(tmp_path):
    """A copy that was let go before the network runs is memory of whatever comes next: of the second copy."""
    value = helper.make_tensor_value_info
    both = [value(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Sub", ["x", "y"], ["z"])],
        "net",
        both,
        [value("z", TensorProto.FLOAT, ["batch", 4])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    RUNTIME.deliver(OnnxModel(proto), (X, X), tmp_path)
    x, y = (np.asfortranarray(factor * np.tile(X, (16, 1))) for factor in (1, 3))
    np.testing.assert_allclose(RUNTIME.open(tmp_path, F32)(x, y), x - y, rtol=1e-6)


def test_an_output_is_not_written_over_by_the_next_call_and_inputs_stay(folder):
    runner, x = RUNTIME.open(folder, F32), X.copy()
    x.flags.writeable = False
    first = runner(x, K)
    kept = first.copy()
    runner(x + 1, K)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(x, X)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 9))
def test_any_batch_gives_what_onnx_runtime_gives(batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ir")
    model = two_inputs()
    RUNTIME.deliver(model, (X[:1], K[:1]), folder)
    rng = np.random.default_rng(batch)
    x, k = rng.standard_normal((batch, 4)).astype(np.float32), rng.integers(0, 2, (batch, 1))
    np.testing.assert_allclose(RUNTIME.open(folder, F32)(x, k), model.run((x, k))[0], rtol=1e-5, atol=1e-5)


def test_the_fixed_batch_of_a_graph_is_known(tmp_path):
    RUNTIME.deliver(two_inputs(batch=3), (X, K), tmp_path)
    runner = RUNTIME.open(tmp_path, F32)
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
        ((X.tolist(), K), "input 'x' must be a NumPy array, got list"),
        ((X, K[:2]), "must have as many examples each, got 2, 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(folder, inputs, said):
    runner = RUNTIME.open(folder, F32)
    with pytest.raises(Refused, match=said):
        runner(*inputs)
    runner(X, K)


@needs_bf16
def test_the_modes_compute_in_what_they_say(folder):
    x = np.full((1, 4), 1 + 2**-12, np.float32)  # bfloat16 has 8 bits: it rounds to 1
    k = np.zeros((1, 1), np.int64)
    exact = float(np.float32(1 + 2**-12)) * 12 + 1
    assert RUNTIME.open(folder, F32)(x, k)[0, 0] == pytest.approx(exact, rel=1e-7)
    low = RUNTIME.open(folder, BF16)(x, k)[0, 0]
    assert low != pytest.approx(exact, rel=1e-7)
    assert low == pytest.approx(exact, rel=1e-2)


def test_settings_are_stated():
    assert module.make_settings(Target("openvino", threads=2)) == {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": 2,
        "ENABLE_CPU_PINNING": False,
    }


def test_a_processor_without_bf16_is_named(folder, monkeypatch):
    monkeypatch.setattr(module, "list_float_precisions", lambda device="cpu": ("f32",))
    with pytest.raises(Refused, match=r"must compute in bf16, got f32\. Use the mode f32") as caught:
        RUNTIME.open(folder, BF16)
    assert caught.value.code == Exit.ENVIRONMENT
    RUNTIME.open(folder, F32)


def test_another_precision_than_asked_is_refused(folder, monkeypatch):
    monkeypatch.setattr(module, "make_settings", lambda target: {"INFERENCE_PRECISION_HINT": "f16"})
    with pytest.raises(Refused, match="must run with INFERENCE_PRECISION_HINT"):
        RUNTIME.open(folder, F32)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "foreign"])
@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_damaged_files_are_refused(folder, damage, name):
    path = folder / name
    if damage == "missing":
        path.unlink()
    elif damage == "foreign" and name == "model.xml":
        path.write_bytes(b"<?xml version='1.0'?><net>nothing</net>")
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-40])
    with pytest.raises(Refused, match=r"model\.(xml|bin)"):
        RUNTIME.open(folder, F32)


def test_an_operator_without_a_conversion_is_named(tmp_path):
    with pytest.raises(Refused, match=r"must convert to OpenVINO.*Det"):
        RUNTIME.deliver(one_node("Det"), (np.ones((1, 2, 2), np.float32),), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_artefact_opens_again_through_the_front_door(tmp_path):
    artefact = pj.deliver(two_inputs(), Target("openvino", threads=1), tmp_path / "a", example=(X[:1], K[:1]))
    assert artefact.target.label == "openvino f32"
    assert artefact == open_artefact(tmp_path / "a")
    assert artefact.size_bytes == sum((tmp_path / "a" / n).stat().st_size for n in ("model.xml", "model.bin"))
    np.testing.assert_allclose(pj.load(tmp_path / "a")(X, K), expected(), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"runtime": "openvino", "mode": "eager"}, "must be one of openvino.*f32 or bf16"),
        ({"runtime": "onnxruntime", "mode": "bf16"}, "must be one of onnxruntime.*Give default"),
        ({"runtime": "torch", "mode": "f32"}, "must be one of torch.*eager or compiled"),
    ],
)
def test_a_mode_of_another_runtime_is_refused(fields, said):
    with pytest.raises(Refused, match=said):
        Target(**fields)


def test_the_reference_of_bfloat16_is_float32():
    assert BF16.reference == F32
    assert F32.reference is F32


def test_importing_it_reports_nothing_to_anybody():
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a connection was asked for")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from penjing.core.target import Target, runtime_for
runtime_for(Target("openvino"))
from penjing.diagnostics.doctor import examine
assert examine()["extras"]["openvino"]["usable"]
assert "openvino" in sys.modules
print([m for m in sys.modules if m.startswith("openvino_telemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def integer_net(kind: str) -> tuple[OnnxModel, np.ndarray]:
    """A convolution or a linear layer behind Q/DQ, with signed weights for each channel."""
    rng, value = np.random.default_rng(1), helper.make_tensor_value_info
    shape = [16, 8, 3, 3] if kind == "Conv" else [8, 16]
    axis = 0 if kind == "Conv" else 1
    weight = rng.integers(-127, 128, shape, np.int8)
    scales = rng.uniform(0.001, 0.01, 16).astype(np.float32)
    inputs = ["batch", 8, 12, 12] if kind == "Conv" else ["batch", 8]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["w", "ws"], ["wq"], axis=axis),
            helper.make_node(kind, ["xq", "wq"], ["h"], name="product"),
            helper.make_node("Relu", ["h"], ["y"]),
        ],
        "net",
        [value("x", TensorProto.FLOAT, inputs)],
        [value("y", TensorProto.FLOAT, ["batch", 16, 10, 10] if kind == "Conv" else ["batch", 16])],
        [
            numpy_helper.from_array(np.array(0.02, np.float32), "s"),
            numpy_helper.from_array(np.array(128, np.uint8), "z"),
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(scales, "ws"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    x = rng.standard_normal([2, *inputs[1:]]).astype(np.float32)
    return OnnxModel(proto), x


@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_layers_stated_in_integers_run_on_integers(kind, tmp_path):
    model, x = integer_net(kind)
    assert list(find_integer_layers(model.proto).values()) == ["product"]
    artefact = pj.deliver(model, F32, tmp_path / "a", example=(x,))
    assert artefact.facts["integer_layers"] == ["product"]
    assert artefact.facts["float_layers"] == {}
    changes = json.loads((artefact.path / "changes.json").read_text())
    assert [(c["method"], c["layer"], c["status"], c["detail"]) for c in changes] == [
        ("openvino", "*", "done", {"integer_layers": 1, "of": 1})
    ]
    found, wanted = pj.load(artefact.path)(x), model.run((x,))[0]
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_integers_that_run_in_float_are_named_with_the_layer(tmp_path):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"], name="dynamic"),
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "s"], ["y"]),
        ],
        "net",
        [value("x", TensorProto.FLOAT, ["batch", 8])],
        [value("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.arange(32, dtype=np.int8).reshape(8, 4) - 16, "w")],
    )
    model = OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    artefact = pj.deliver(model, F32, tmp_path / "a", example=(np.ones((1, 8), np.float32),))
    assert artefact.facts["float_layers"] == {"dynamic": "f32"}
    assert artefact.facts["batch_dependent"] is True
    whole, layer = json.loads((artefact.path / "changes.json").read_text())
    assert (whole["status"], whole["reason"]) == ("skipped", "no layer runs on integers")
    assert (layer["layer"], layer["reason"]) == ("dynamic", "stated in integers, but OpenVINO runs it in f32")


def test_rounding_noise_is_that_of_integers_only():
    model, x = integer_net("Conv")
    assert STEP <= measure_rounding_noise(model, (x,)) < 0.02
    assert measure_rounding_noise(two_inputs(), (X, K)) == 0.0


def test_a_model_that_was_delivered_is_measured_as_it_runs():
    task = pj.Task(
        train=(X, K[:, 0]),
        valid=(np.tile(X, (20, 1)), np.tile(K[:, 0], 20)),
        test=(X, K[:, 0]),
        batch_size=7,
        max_overlap=1,
    )
    one = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w")],
    )
    model = OnnxModel(helper.make_model(one, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    found = pj.measure(model, task, F32)
    assert found.target == "openvino f32"
    assert found.difference is not None
    assert found.difference < 1e-5
    assert found.latency.kind == "latency"
    assert found.memory_bytes.value > 1e6
