"""Scales moved between layers of ONNX graphs: the same function, ranges that meet, and what stops them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import penjing as pj
from penjing.arrays.equalization import Pair, equalizing_factors, input_ranges, precision, scaled_inputs
from penjing.arrays.formats.coding import rounded
from penjing.backends.onnx import BACKEND
from penjing.core.number_format import number_format


def images(n, shape):
    return np.random.default_rng(1).standard_normal((n, *shape)).astype(np.float32)


def uneven(made, name, seed=0):
    """Give the channels that a layer makes very different sizes, weights and biases alike."""
    factors = np.exp(np.random.default_rng(seed).uniform(-3, 3, len(made.arrays[f"{name}.weight"])))
    for part in ("weight", "bias"):
        array = made.arrays[f"{name}.{part}"]
        made.arrays[f"{name}.{part}"] = np.float32(array * factors.reshape(-1, *[1] * (array.ndim - 1)))


@pytest.fixture
def separable(net):
    """Convolution, ReLU, depthwise, padding, leaky ReLU, pointwise, global mean, classifier."""
    made = net((3, 8, 8))
    x = made.node("Relu", made.conv("x", "first", (16, 3, 3, 3)))
    x = made.node("Pad", x, made.constant("pads", np.array([0, 0, 0, 0, 0, 0, 1, 1])))
    x = made.node("LeakyRelu", made.conv(x, "depthwise", (16, 1, 3, 3), group=16), alpha=0.1)
    x = made.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = made.node("Relu", made.conv(x, "grouped", (24, 8, 1, 1), group=2))
    x = made.node("Flatten", made.node("GlobalAveragePool", x))
    x = made.node("Relu", made.linear(x, "hidden", 12, 24))
    for name in ("first", "depthwise", "hidden"):
        uneven(made, name)
    return made.model(made.linear(x, "head", 5, 12))


def weights(model):
    return {
        t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer if t.name.endswith(".weight")
    }


def error_per_tensor(model, inputs, bits=8):
    """Relative error of the outputs with every weight on one grid."""
    form = number_format(f"int{bits} narrow")
    changed = BACKEND.copy(model)
    for layer in BACKEND.layers(model):
        weight = BACKEND.read(model, layer.name)["weight"]
        BACKEND.write(changed, layer.name, {"weight": rounded(weight, form)})
    old, new = (BACKEND.run(m, inputs) for m in (model, changed))
    return np.linalg.norm(new - old) / np.linalg.norm(old)


def test_the_model_computes_the_same_and_one_grid_serves_every_weight(separable, task_of):
    x = images(64, (3, 8, 8))
    applied = pj.apply(separable, pj.EqualizeWeights(), task_of(x))
    old, new = BACKEND.run(separable, (x,)), BACKEND.run(applied.model, (x,))
    assert np.linalg.norm(new - old) <= 1e-5 * np.linalg.norm(old)
    changes = {change.layer: change for change in applied.changes}
    assert [name for name, change in changes.items() if change.done] == [
        "first",
        "depthwise",
        "grouped",
        "hidden",
        "head",
    ]
    assert changes["depthwise"].detail["with"] == "first, grouped"
    first = changes["first"].detail
    assert first["precision_after"] > 1.2 * first["precision_before"]
    assert error_per_tensor(applied.model, (x,)) < error_per_tensor(separable, (x,)) / 2


def test_ranges_on_both_sides_of_every_pair_meet(separable, task_of):
    applied = pj.apply(separable, pj.EqualizeWeights(), task_of(images(16, (3, 8, 8))))
    found = weights(applied.model)
    made = np.abs(found["first.weight"]).max((1, 2, 3))
    np.testing.assert_allclose(made, input_ranges(found["depthwise.weight"], 16), rtol=5e-3)
    made = np.abs(found["depthwise.weight"]).max((1, 2, 3))
    np.testing.assert_allclose(made, input_ranges(found["grouped.weight"], 2), rtol=5e-3)


def test_only_what_is_covered_changes(separable, task_of):
    plan = pj.only("first | depthwise", pj.EqualizeWeights())
    applied = pj.apply(separable, plan, task_of(images(16, (3, 8, 8))))
    old, new = weights(separable), weights(applied.model)
    same = {name for name in old if np.array_equal(old[name], new[name])}
    assert same == {"grouped.weight", "hidden.weight", "head.weight"}
    assert {c.layer: c.reason for c in applied.changes}["head"] == "not covered by the pattern"


def test_what_a_scale_does_not_pass_is_named(net, task_of):
    made = net((4, 6, 6))
    a = made.relu6(made.conv("x", "clipped", (4, 4, 3, 3)))
    b = made.node("Relu", made.conv(a, "summed", (4, 4, 3, 3)))
    c = made.node("Sigmoid", made.conv(b, "bent", (4, 4, 3, 3)))
    d = made.conv(made.node("Add", b, c), "last", (4, 4, 1, 1))
    e = made.node("Relu", made.conv(d, "good", (4, 4, 3, 3)))
    model = made.model(made.conv(e, "end", (2, 4, 1, 1)))
    applied = pj.apply(model, pj.EqualizeWeights(), task_of(images(16, (4, 6, 6))))
    reasons = {c.layer: c.reason for c in applied.changes if not c.done}
    assert "cut off at 6 (ReLU6)" in reasons["clipped"]
    assert "Add" in reasons["summed"]
    assert "Sigmoid" in reasons["bent"]
    assert {c.layer for c in applied.changes if c.done} == {"last", "good", "end"}


def test_a_model_without_pairs_and_one_that_is_quantized_are_refused(net, task_of):
    task = task_of(images(16, (4, 6, 6)))
    made = net((4, 6, 6))
    alone = made.model(made.conv("x", "alone", (4, 4, 3, 3)))
    with pytest.raises(pj.Refused, match="must change at least one layer"):
        pj.apply(alone, pj.EqualizeWeights(), task)
    with pytest.raises(pj.Refused, match="must be in float"):
        pj.apply(alone, pj.chain(pj.Int8Static(examples=8), pj.EqualizeWeights()), task)


def test_weights_that_two_layers_share_stay(net, task_of):
    made = net((4, 6, 6))
    x = made.node("Relu", made.conv("x", "twice", (4, 4, 3, 3)))
    x = made.node("Relu", made.node("Conv", x, "twice.weight", "twice.bias", pads=[1, 1, 1, 1]))
    x = made.node("Relu", made.conv(x, "own", (4, 4, 3, 3)))
    model = made.model(made.conv(x, "end", (2, 4, 1, 1)))
    applied = pj.apply(model, pj.EqualizeWeights(), task_of(images(16, (4, 6, 6))))
    reasons = {c.layer: c.reason for c in applied.changes if not c.done}
    assert reasons == {"twice": "its weight or bias is another layer's too"}


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=3, max_size=5),
    seed=st.integers(0, 10**6),
    zeros=st.booleans(),
)
def test_equalized_chains_compute_the_same_and_never_use_less_of_the_grid(widths, seed, zeros):
    rng = np.random.default_rng(seed)
    names = [str(number) for number in range(len(widths) - 1)]
    old = {
        n: rng.normal(size=(widths[i + 1], widths[i])) * np.exp(rng.uniform(-3, 3, (widths[i + 1], 1)))
        for i, n in enumerate(names)
    }
    if zeros:
        old["0"][0] = 0
    pairs = [Pair(a, (b,)) for a, b in itertools.pairwise(names)]
    factors = equalizing_factors(pairs, old, dict.fromkeys(names, 1), sweeps=1000)
    new = dict(old)
    for pair in pairs:
        factor = factors[pair.producer]
        assert (factor > 0).all()
        assert np.isfinite(factor).all()
        new[pair.producer] = new[pair.producer] / factor[:, None]
        new[pair.consumers[0]] = scaled_inputs(new[pair.consumers[0]], factor, 1)
    x = rng.normal(size=(7, widths[0]))
    outputs = []
    for tensors in (old, new):
        y = x
        for name in names:
            y = np.maximum(y @ tensors[name].T, 0)
        outputs.append(y)
    np.testing.assert_allclose(
        outputs[1], outputs[0], rtol=1e-9, atol=1e-12 * max(np.abs(outputs[0]).max(), 1)
    )
    for pair in pairs:
        made = np.abs(new[pair.producer]).max(1)
        taken = input_ranges(new[pair.consumers[0]], 1)
        live = (made > 0) & (taken > 0)
        np.testing.assert_allclose(made[live], taken[live], rtol=0.01)


def test_precision_is_the_share_of_one_grid_that_channels_use():
    assert precision(np.array([[4.0, 1.0], [1.0, -2.0]])) == pytest.approx((4 + 2) / 2 / 4)
    assert precision(np.zeros((2, 3))) == 1
