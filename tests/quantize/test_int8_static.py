from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import penjing as pj
from oracles.quantization import dequantize
from penjing.arrays import quantization as q
from penjing.backends.onnx import BACKEND, OnnxModel
from penjing.backends.onnx.model import open_session, run_session
from penjing.core.errors import Refused
from penjing.core.task import Split, Task


def fused(model, tmp_path):
    """Count the operators that ONNX Runtime really runs."""
    path = str(tmp_path / "optimized.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = path
    options.log_severity_level = 4
    ort.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def cosine(a, b):
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def done(applied):
    return [change.layer for change in applied.changes if change.done and change.layer != "*"]


def test_residual_network_runs_on_integer_kernels_only(resnet, task_of, tmp_path):
    model, x = resnet
    applied = pj.apply(model, pj.Int8Static(examples=64), task_of(x))
    kinds = fused(applied.model, tmp_path)
    assert kinds["QLinearConv"] == 7
    assert kinds["QLinearAdd"] == 2
    assert (kinds["QLinearConcat"], kinds["QLinearGlobalAveragePool"], kinds["QGemm"]) == (1, 1, 1)
    assert not {"Conv", "Add", "Relu", "Gemm", "Concat", "DequantizeLinear"} & set(kinds)
    assert kinds["QuantizeLinear"] == 1
    assert cosine(applied.model.run((x,))[0], model.run((x,))[0]) > 0.999
    assert done(applied) == [
        "stem",
        "block1.conv1",
        "block1.conv2",
        "block2.conv1",
        "block2.conv2",
        "side",
        "last",
        "fc",
    ]
    assert all(0 < c.detail["weight_error"] < 0.01 for c in applied.changes if c.done and c.layer != "*")


def test_depthwise_relu6_and_gates_run_on_integer_kernels(mobilenet, task_of, tmp_path):
    model, x = mobilenet
    applied = pj.apply(model, pj.Int8Static(examples=64), task_of(x))
    kinds = fused(applied.model, tmp_path)
    assert kinds["QLinearConv"] == 6
    assert (kinds["QLinearSigmoid"], kinds["QLinearMul"], kinds["QLinearAveragePool"]) == (1, 1, 1)
    assert not {"Conv", "Clip", "Mul", "Gemm", "Sigmoid"} & set(kinds)
    assert cosine(applied.model.run((x,))[0], model.run((x,))[0]) > 0.999


def test_weights_are_signed_and_activations_unsigned(resnet, task_of):
    model, x = resnet
    graph = pj.apply(model, pj.Int8Static(examples=32), task_of(x)).model.proto.graph
    kinds = {tensor.name: onnx.numpy_helper.to_array(tensor).dtype for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert kinds[node.input[2]] == np.uint8
        if node.op_type == "Conv":
            source = next(n for n in graph.node if n.output[0] == node.input[1])
            assert kinds[source.input[0]] == np.int8
            assert source.attribute[0].i == 0


def zero_points_and_steps(graph):
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    activations = {arrays[n.input[2]].dtype.name for n in graph.node if n.op_type == "QuantizeLinear"}
    weights = {
        arrays[n.input[1]].ndim
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in arrays and arrays[n.input[0]].ndim > 1
    }
    return activations, weights


@pytest.mark.parametrize("model_of", ["resnet", "mobilenet"])
def test_signed_activations_have_the_same_values(model_of, request, task_of):
    model, x = request.getfixturevalue(model_of)
    one, other = (
        pj.apply(model, pj.Int8Static(examples=32, inputs=kind), task_of(x)).model
        for kind in ("uint8", "int8")
    )
    assert zero_points_and_steps(other.proto.graph) == ({"int8"}, {1})
    plain = [run_session(open_session(m.proto, "basic"), None, {"x": x})[0] for m in (one, other)]
    assert np.array_equal(*plain)
    assert cosine(one.run((x,))[0], other.run((x,))[0]) > 0.9999


def test_one_step_for_a_whole_weight_loses_more_and_biases_are_still_corrected(resnet, task_of, tmp_path):
    model, x = resnet
    plan = pj.chain(pj.Int8Static(examples=64, weights="int8 tensor"), pj.CorrectBias(examples=64))
    applied, usual = (pj.apply(model, each, task_of(x)) for each in (plan, pj.Int8Static(examples=64)))
    assert zero_points_and_steps(applied.model.proto.graph) == ({"uint8"}, {0})
    assert fused(applied.model, tmp_path)["QLinearConv"] == 7
    errors = [
        sum(c.detail["weight_error"] for c in found.changes if "weight_error" in c.detail)
        for found in (applied, usual)
    ]
    assert errors[0] > 1.1 * errors[1]
    assert cosine(applied.model.run((x,))[0], model.run((x,))[0]) > 0.999
    means = [c.detail for c in applied.changes if c.method == "CorrectBias" and c.done]
    assert len(means) == 8
    assert sum(m["mean_error_after"] for m in means) < 0.5 * sum(m["mean_error_before"] for m in means)


def test_one_convolution_equals_the_simulation(net, task_of):
    made = net((3, 8, 8))
    model = made.model(made.conv("x", "c", (4, 3, 1, 1)))
    x = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    applied = pj.apply(model, pj.Int8Static(observer="minmax", examples=16), task_of(x))
    weight, bias = (BACKEND.read(model, "c")[key] for key in ("weight", "bias"))
    grid = q.grid_of_range(x.min(), x.max())
    scales = q.weight_scales(weight)
    steps = grid.scale * scales
    total = np.einsum(
        "nchw,oc->nohw",
        q.quantize(x, grid).astype(np.int64) - grid.zero_point,
        q.quantize_weight(weight, scales)[:, :, 0, 0].astype(np.int64),
    )
    y = ((total + q.quantize_bias(bias, steps).reshape(-1, 1, 1)) * steps.reshape(-1, 1, 1)).astype(
        np.float32
    )
    out = model.run((x,))[0]
    grid = q.grid_of_range(out.min(), out.max())
    got = applied.model.run((x,))[0]
    assert np.abs(got - dequantize(q.quantize(y, grid), grid)).max() <= float(grid.scale) * 1.01
    assert np.mean(got != dequantize(q.quantize(y, grid), grid)) < 0.001
    assert applied.model.proto.graph.output[0].name == model.proto.graph.output[0].name


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(net, task_of, rank, tmp_path):
    made = net((3, *[8] * rank))
    a = made.node("Relu", made.conv("x", "a", (8, 3, *[3] * rank)))
    model = made.model(made.conv(a, "b", (4, 8, *[3] * rank)))
    x = np.random.default_rng(0).standard_normal((32, *made.shape)).astype(np.float32)
    applied = pj.apply(model, pj.Int8Static(examples=32), task_of(x))
    assert fused(applied.model, tmp_path)["QLinearConv"] == 2
    assert cosine(applied.model.run((x,))[0], model.run((x,))[0]) > 0.999


def test_relu_with_other_users_before_it_works_on_integers(net, task_of, tmp_path):
    made = net((4, 8, 8))
    a = made.conv("x", "a", (4, 4, 3, 3))
    b = made.conv(made.node("Relu", a), "b", (4, 4, 3, 3))
    total = made.node("Add", a, b)
    model = made.model(made.conv(made.relu6(total), "c", (4, 4, 1, 1)), total)
    x = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    applied = pj.apply(model, pj.Int8Static(examples=64), task_of(x))
    kinds = fused(applied.model, tmp_path)
    assert kinds["QLinearConv"] == 3
    assert "Relu" not in kinds
    for got, wanted in zip(applied.model.run((x,)), model.run((x,)), strict=True):
        assert cosine(got, wanted) > 0.999


def test_weight_used_twice_is_one_layer_and_right_at_both_places(net, task_of):
    made = net((4, 8, 8))
    a = made.node("Relu", made.conv("x", "same", (4, 4, 3, 3)))
    b = made.node("Conv", a, "same.weight", "same.bias", pads=[1, 1, 1, 1])
    model = made.model(b)
    x = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    plan = pj.chain(pj.Int8Static(examples=64), pj.CorrectBias(examples=64))
    applied = pj.apply(model, plan, task_of(x))
    assert done(applied)[0] == "same"
    assert cosine(applied.model.run((x,))[0], model.run((x,))[0]) > 0.999


def test_embedding_transpose_and_softmax_stay_float_with_reasons(net, task_of):
    made = net((6,))
    table = made.constant("table.weight", made.randn(20, 8))
    a = made.node("Transpose", made.node("Gather", table, "x"), perm=[0, 2, 1])
    a = made.conv(a, "conv", (8, 8, 3))
    b = made.constant("up.weight", made.randn(8, 4, 2))
    a = made.node("Softmax", made.node("ConvTranspose", a, b, strides=[2]))
    model = made.model(made.linear(made.node("Flatten", a), "fc", 5, 48), kind=onnx.TensorProto.INT64)
    ids = np.random.default_rng(0).integers(0, 20, (64, 6))
    applied = pj.apply(model, pj.Int8Static(examples=64), task_of(ids))
    reasons = {change.layer: change.reason for change in applied.changes if not change.done}
    assert done(applied) == ["conv", "fc"]
    assert "hundred times slower" in reasons["table"]
    assert "no integer kernel for ConvTranspose" in reasons["up"]
    assert any("Softmax stays float" in reason for reason in reasons.values())


def test_only_leaves_layers_float_and_says_so(resnet, task_of, tmp_path):
    model, x = resnet
    applied = pj.apply(model, pj.only("!stem | !block2.*", pj.Int8Static(examples=32)), task_of(x))
    reasons = {change.layer: change.reason for change in applied.changes if not change.done}
    assert reasons["stem"] == reasons["block2.conv1"] == "not covered by the pattern"
    assert fused(applied.model, tmp_path)["QLinearConv"] == 4
    applied = pj.apply(model, pj.only("block1.*", pj.Int8Static(examples=32)), task_of(x))
    assert done(applied) == ["block1.conv1", "block1.conv2"]
    assert cosine(applied.model.run((x,))[0], model.run((x,))[0]) > 0.999
    with pytest.raises(Refused, match="must match a layer of the model, got 'nothing'"):
        pj.apply(model, pj.only("nothing", pj.Int8Static()), task_of(x))


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_input_untouched_same_seed_same_result_and_any_batch(resnet, task_of, observer):
    model, x = resnet
    before = BACKEND.fingerprint(model)
    method = pj.Int8Static(observer=observer, examples=48)
    first, second = (pj.apply(model, method, task_of(x)).model for _ in range(2))
    assert BACKEND.fingerprint(model) == before
    assert BACKEND.fingerprint(first) == BACKEND.fingerprint(second)
    assert cosine(first.run((x,))[0], model.run((x,))[0]) > 0.998
    np.testing.assert_allclose(first.run((x[:1],))[0], first.run((x,))[0][:1], rtol=1e-5, atol=1e-6)


def test_result_is_a_checked_file_a_quarter_of_the_size(resnet, task_of, tmp_path):
    model, x = resnet
    small = pj.apply(model, pj.Int8Static(examples=32), task_of(x)).model
    BACKEND.export(small, (x[:1],), tmp_path / "small.onnx")
    session = ort.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x[:4]})[0], small.run((x[:4],))[0])
    arrays = [onnx.numpy_helper.to_array(t) for t in small.proto.graph.initializer]
    weights = sum(a.nbytes for a in arrays if a.dtype == np.int8 and a.ndim > 1)
    names = [layer.name for layer in BACKEND.layers(model)]
    assert weights * 4 == sum(BACKEND.read(model, name)["weight"].nbytes for name in names)
    before, after = (BACKEND.operations(m, (x[:1],)) for m in (model, small))
    assert after.zeros > before.zeros, "small weights are rounded to zero"
    assert before == after.model_copy(update={"zeros": before.zeros})


def calibrated_on(model, x):
    good = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    valid, train = (Split((a,), np.zeros(len(a), np.int64), "train") for a in (good, x))
    task = Task(train=train, valid=valid, test=valid, prepared=True)
    return pj.apply(model, pj.Int8Static(examples=16), task)


@pytest.mark.parametrize(
    ("fill", "message"), [(0.0, "inputs must vary.*0"), (2.5, "inputs must vary.*2.5"), (np.nan, "NaN")]
)
def test_calibration_that_says_nothing_is_refused(resnet, fill, message):
    model, x = resnet
    with pytest.raises(Refused, match=message):
        calibrated_on(model, np.full_like(x[:16], fill))


def test_infinite_values_are_refused_with_the_tensor(resnet):
    model, x = resnet
    bad = x[:16].copy()
    bad[3, 0, 0, 0] = np.inf
    with pytest.raises(Refused, match=r"tensor 'x'.*must be finite"):
        calibrated_on(model, bad)


def test_empty_calibration_is_refused(resnet, task_of):
    model, x = resnet
    task = task_of(x)
    empty = Split((x[:0],), np.zeros(0, np.int64), "train")
    task = Task(train=empty, valid=task.valid, test=task.test, prepared=True)
    with pytest.raises(Refused, match=r"task\.train must have examples to calibrate on, got 0"):
        pj.apply(model, pj.Int8Static(), task)


def test_quantized_model_is_not_quantized_again(resnet, task_of):
    model, x = resnet
    small = pj.apply(model, pj.Int8Static(examples=16), task_of(x)).model
    for method in (pj.Int8Static(), pj.Int8Dynamic()):
        with pytest.raises(
            Refused, match=r"must be in float, got an integer operator, (Quantize|Dequantize)Linear"
        ):
            pj.apply(small, method, task_of(x))
        with pytest.raises(Refused, match="must be in float"):
            pj.apply(OnnxModel(small.proto), method, task_of(x))


def test_model_without_layers_is_refused(net, task_of):
    made = net((3,))
    x = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    with pytest.raises(Refused, match="no layer fits"):
        pj.apply(made.model(made.node("Relu", "x")), pj.Int8Static(), task_of(x))


@pytest.mark.parametrize("fields", [{"observer": "magic"}, {"examples": 0}, {"bits": 4}])
def test_bad_configuration_is_refused_at_construction(fields):
    with pytest.raises(Refused):
        pj.Int8Static(**fields)


def test_model_with_a_fixed_batch_of_one_is_calibrated_one_by_one(resnet, task_of):
    model, x = resnet
    model.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.proto.graph.value_info[:]
    del model.proto.graph.output[0].type.tensor_type.shape.dim[:]
    model.proto.graph.output[0].type.tensor_type.ClearField("shape")
    plan = pj.chain(pj.Int8Static(examples=8), pj.CorrectBias(examples=8))
    small = pj.apply(model, plan, task_of(x)).model
    assert cosine(small.run((x[:1],))[0], model.run((x[:1],))[0]) > 0.99
