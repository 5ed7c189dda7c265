from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import penjing as pj
from penjing.backends.onnx import BACKEND
from penjing.core.errors import Refused


def fused(model, tmp_path):
    path = str(tmp_path / "optimized.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = path
    options.log_severity_level = 4
    ort.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture
def encoder(net):
    """Two products of one input, one product behind them, and a classifier; [6, 16] to 5."""
    made = net((6, 16))

    def product(x, name, out, given):
        weight = made.constant(f"{name}.weight", made.randn(given, out) / np.float32(np.sqrt(given)))
        return made.node(
            "Add", made.node("MatMul", x, weight), made.constant(f"{name}.bias", made.randn(out))
        )

    a, b = product("x", "query", 32, 16), product("x", "value", 32, 16)
    c = product(made.node("Mul", made.node("Sigmoid", a), b), "up", 64, 32)
    axes = made.constant("axes", np.array([1]))
    pooled = made.node("ReduceMean", made.node("Relu", c), axes, keepdims=0)
    model = made.model(made.linear(pooled, "fc", 5, 64))
    return model, np.random.default_rng(0).standard_normal((64, 6, 16)).astype(np.float32)


def test_linear_layers_run_on_integers(encoder, task_of, tmp_path):
    model, x = encoder
    applied = pj.apply(model, pj.Int8Dynamic(), task_of(x))
    assert [c.layer for c in applied.changes if c.done] == ["query", "value", "up", "fc", "*"]
    kinds = fused(applied.model, tmp_path)
    assert kinds["MatMulIntegerToFloat"] + kinds["DynamicQuantizeMatMul"] == 4
    assert not {"MatMul", "Gemm", "MatMulInteger"} & set(kinds)
    got, wanted = applied.model.run((x,))[0], model.run((x,))[0]
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)
    before, after = (BACKEND.operations(m, (x[:1],)) for m in (model, applied.model))
    assert (before.parameters, before.multiply_adds) == (after.parameters, after.multiply_adds)


def test_an_input_of_several_layers_is_quantized_once(encoder, task_of):
    model, x = encoder
    graph = pj.apply(model, pj.Int8Dynamic(), task_of(x)).model.proto.graph
    assert sum(node.op_type == "DynamicQuantizeLinear" for node in graph.node) == 3


def test_weights_read_back_within_half_a_step(encoder, task_of):
    model, x = encoder
    small = pj.apply(model, pj.Int8Dynamic(), task_of(x)).model
    weight = BACKEND.read(model, "up")["weight"]
    graph = {t.name: onnx.numpy_helper.to_array(t) for t in small.proto.graph.initializer}
    integers, scales = graph["up.weight_quantized"], graph["up.weight_scale"]
    assert integers.dtype == np.int8
    assert np.abs(integers.T * scales[:, None] - weight).max() <= scales.max() * 0.501


def test_convolutions_stay_float_and_the_reason_is_speed(resnet, task_of):
    model, x = resnet
    applied = pj.apply(model, pj.Int8Dynamic(), task_of(x))
    status = {change.layer: change for change in applied.changes}
    assert status["fc"].done
    assert not status["stem"].done
    assert "slower than the float one" in status["stem"].reason


def test_only_covers_names(encoder, task_of):
    model, x = encoder
    applied = pj.apply(model, pj.only("up", pj.Int8Dynamic()), task_of(x))
    assert [c.layer for c in applied.changes if c.done] == ["up", "*"]


def test_network_of_convolutions_only_is_refused(net, task_of):
    made = net((3, 8, 8))
    x = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    with pytest.raises(Refused, match="slower than the float one"):
        pj.apply(made.model(made.conv("x", "c", (4, 3, 3, 3))), pj.Int8Dynamic(), task_of(x))
