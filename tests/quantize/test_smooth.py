"""Smoothed activations in ONNX graphs."""

import numpy as np
import pytest
from onnx import numpy_helper

import penjing as pj
from penjing.backends.onnx import BACKEND

LOUD = [3, 17]


def loud(n=128, width=32, seed=1):
    x = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    x[:, LOUD] *= 60
    return x


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}


def kinds(model):
    return [node.op_type for node in model.proto.graph.node]


@pytest.fixture
def shared(net):
    """The input goes to two linear layers and to a sum: its division needs an operator."""
    made = net((32,))
    both = made.node("Add", made.linear("x", "a", 32, 32), made.linear("x", "b", 32, 32))
    return made.model(made.node("Add", both, "x"))


@pytest.fixture
def normed(net):
    """A normalization with loud channels, whose output one linear layer takes."""
    made = net((32,))
    scale = np.ones(32, np.float32)
    scale[LOUD] = 60
    y = made.node(
        "LayerNormalization",
        "x",
        made.constant("norm.weight", scale),
        made.constant("norm.bias", np.linspace(-1, 1, 32, dtype=np.float32)),
    )
    return made.model(made.linear(y, "up", 24, 32))


def test_the_model_computes_the_same_and_integers_err_less(shared, task_of):
    task, x = task_of(loud()), loud(seed=2)
    smoothed = pj.apply(shared, pj.SmoothActivations(), task)
    assert relative(smoothed.model.run((x,))[0], shared.run((x,))[0]) < 1e-5
    assert kinds(smoothed.model).count("Mul") == 1
    by_layer = {c.layer: c for c in smoothed.changes}
    assert by_layer["a"].detail["strength"] == by_layer["b"].detail["strength"] > 0
    assert by_layer["a"].detail["error_after"] < by_layer["a"].detail["error_before"] / 5
    plain = pj.apply(shared, pj.Int8Static(observer="minmax"), task).model
    both = pj.apply(shared, pj.chain(pj.SmoothActivations(), pj.Int8Static(observer="minmax")), task).model
    wanted = shared.run((x,))[0] - x
    assert relative(both.run((x,))[0] - x, wanted) < 0.5 * relative(plain.run((x,))[0] - x, wanted)
    assert {"a.weight_quantized", "b.weight_quantized"} <= set(constants(both))


def test_a_normalization_takes_the_division_up(normed, task_of):
    x = np.random.default_rng(0).standard_normal((128, 32)).astype(np.float32)
    done = pj.apply(normed, pj.SmoothActivations(), task_of(x)).model
    assert "Mul" not in kinds(done)
    assert relative(done.run((x,))[0], normed.run((x,))[0]) < 1e-5
    before, after = constants(normed), constants(done)
    factors = before["norm.weight"] / after["norm.weight"]
    np.testing.assert_allclose(after["norm.bias"], before["norm.bias"] / factors, rtol=1e-5)
    np.testing.assert_allclose(after["up.weight"], before["up.weight"] * factors, rtol=1e-5)
    assert factors[LOUD].min() > 5 * np.delete(factors, LOUD).max()


@pytest.mark.parametrize("activation", [None, "Relu", "LeakyRelu"])
@pytest.mark.parametrize("form", ["Gemm", "MatMul and Add", "MatMul"])
def test_a_linear_layer_in_front_takes_the_division_up(net, task_of, form, activation):
    made = net((4, 32) if form != "Gemm" else (32,))
    gains = np.ones(32, np.float32)
    gains[LOUD] = 60
    weight = made.constant("first.weight", made.randn(32, 32) * gains)
    bias = made.constant("first.bias", made.randn(32) * gains)
    if form == "Gemm":
        y = made.node("Gemm", "x", weight, bias)
    else:
        y = made.node("MatMul", "x", weight)
        y = made.node("Add", y, bias) if form == "MatMul and Add" else y
    y = y if activation is None else made.node(activation, y)
    last = made.constant("second.weight", made.randn(32, 8))
    model = made.model(made.node("MatMul", y, last))
    x = np.random.default_rng(0).standard_normal((128, *made.shape)).astype(np.float32)
    done = pj.apply(model, pj.only("second", pj.SmoothActivations()), task_of(x)).model
    assert "Mul" not in kinds(done)
    assert relative(done.run((x,))[0], model.run((x,))[0]) < 1e-5
    assert not np.allclose(constants(done)["first.weight"], constants(model)["first.weight"])


def test_a_weight_that_others_use_stays_for_them(net, task_of):
    made = net((32,))
    weight = made.constant("tied.weight", made.randn(32, 32))
    model = made.model(made.node("MatMul", made.node("Relu", made.node("MatMul", "x", weight)), weight))
    x = loud()
    done = pj.apply(model, pj.SmoothActivations(), task_of(x)).model
    assert relative(done.run((x,))[0], model.run((x,))[0]) < 1e-5
    assert len(BACKEND.layers(done)) == 2


def test_what_cannot_be_smoothed_says_so(net, task_of, shared):
    made = net((3, 8, 8))
    model = made.model(made.conv("x", "c", (4, 3, 3, 3)))
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    with pytest.raises(pj.Refused, match="no row of channels"):
        pj.apply(model, pj.SmoothActivations(), task_of(x))
    even = np.random.default_rng(0).uniform(-1, 1, (64, 32)).astype(np.float32)
    with pytest.raises(pj.Refused, match="gains too little"):
        pj.apply(shared, pj.SmoothActivations(gain=0.95), task_of(even))
    quantized = pj.apply(shared, pj.Int8Static(), task_of(loud())).model
    with pytest.raises(pj.Refused, match="must be in float"):
        pj.apply(quantized, pj.SmoothActivations(), task_of(loud()))
