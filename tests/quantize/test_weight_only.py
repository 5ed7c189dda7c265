"""Packed weights by ONNX Runtime's MatMulNBits."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import penjing as pj
from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import rounded
from penjing.core.number_format import number_format
from penjing.core.task import Task

X = np.random.default_rng(0).standard_normal((40, 72)).astype(np.float32)


@pytest.fixture
def task():
    y = np.zeros(40, np.int64)
    return Task(train=(X, y), valid=(X[:20], y[:20]), test=(X[20:], y[20:]), max_overlap=1)


@pytest.fixture
def network(net):
    """Two linear layers, one with an input width that no block divides."""
    made = net((72,))
    hidden = made.node("Relu", made.linear("x", "up", 64, 72))
    return made.model(made.linear(hidden, "down", 10, 64))


@pytest.mark.parametrize("name", ["int4 group 32", "uint4 group 16", "int8 group 64", "uint8 group 32"])
def test_the_product_is_that_with_the_decoded_weights(network, task, name):
    done = pj.apply(network, pj.WeightOnly(name, compute="float32"), task)
    assert [node.op_type for node in done.model.proto.graph.node].count("MatMulNBits") == 2
    weights = {t.name: t for t in network.proto.graph.initializer}
    from onnx import numpy_helper

    value, form = X, number_format(name)
    for layer in ("up", "down"):
        weight, bias = (numpy_helper.to_array(weights[f"{layer}.{part}"]) for part in ("weight", "bias"))
        value = value @ rounded(weight, form, *clipped_parameters(weight, form)).T + bias
        value = np.maximum(value, 0) if layer == "up" else value
    np.testing.assert_allclose(done.model.run((X,))[0], value, rtol=1e-4, atol=1e-4)
    facts = {c.layer: c.detail for c in done.changes if c.done}
    assert facts["up"]["format"] == name
    assert 0 < facts["up"]["weight_error"] < 0.15
    assert facts["*"]["cosine"] > 0.98


def test_the_artefact_is_smaller_and_computes_in_a_runtime_of_its_own(network, task, tmp_path):
    sizes = {}
    for name, plan in (("float", ()), ("packed", (pj.WeightOnly("int4 group 32"),))):
        model = pj.apply(network, plan, task).model if plan else network
        artefact = pj.deliver(model, pj.Target(), tmp_path / name, example=(X[:1],))
        sizes[name] = artefact.size_bytes
        made = pj.load(artefact.path)(X)
        np.testing.assert_allclose(made, model.run((X,))[0], rtol=1e-4, atol=1e-4)
    assert sizes["packed"] < 0.5 * sizes["float"]


def test_other_layers_stay_with_a_reason(net):
    made = net((1, 8, 9))
    model = made.model(made.conv("x", "conv", (4, 1, 3, 3)))
    images = X.reshape(40, 1, 8, 9)
    y = np.zeros(40, np.int64)
    work = Task(train=(images, y), valid=(images[:20], y[:20]), test=(images[20:], y[20:]), max_overlap=1)
    with pytest.raises(pj.Refused, match="the operator multiplies matrices only"):
        pj.apply(model, pj.WeightOnly(), work)


def test_twice_and_bad_formats_are_refused(network, task):
    once = pj.apply(network, pj.WeightOnly(), task).model
    with pytest.raises(pj.Refused, match="must be in float"):
        pj.apply(once, pj.WeightOnly(), task)
    for wrong in (
        "int4",
        "int3 group 32",
        "int4 group 24",
        "int4 narrow group 32",
        "nf4",
        "int4 asymmetric group 32",
    ):
        with pytest.raises(pj.Refused, match="weights"):
            pj.WeightOnly(wrong)
