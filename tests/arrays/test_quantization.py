import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from oracles.quantization import dequantize
from penjing.arrays import quantization as q
from penjing.core.errors import Refused

FINITE = st.floats(-1e6, 1e6, width=32)
ENDS = st.tuples(st.floats(-1e4, 0, width=32), st.floats(0, 1e4, width=32))


def session(nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def runtime():
    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    grid = [value("s", TensorProto.FLOAT, []), value("z", TensorProto.UINT8, [])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return session(
        nodes,
        [value("x", TensorProto.FLOAT, ["n"]), *grid],
        [value("q", TensorProto.UINT8, ["n"]), value("y", TensorProto.FLOAT, ["n"])],
    )


@settings(max_examples=200, deadline=None)
@given(x=arrays(np.float32, st.integers(1, 40), elements=FINITE), ends=ENDS)
def test_rounding_is_the_runtimes_bit_for_bit(runtime, x, ends):
    grid = q.grid_of_range(*ends)
    feed = {"x": x, "s": np.asarray(grid.scale), "z": np.asarray(grid.zero_point, np.uint8)}
    integers, real = runtime.run(None, feed)
    np.testing.assert_array_equal(q.quantize(x, grid), integers)
    np.testing.assert_array_equal(dequantize(q.quantize(x, grid), grid), real)


@settings(max_examples=100, deadline=None)
@given(ends=ENDS, share=st.floats(0, 1))
def test_grid_covers_its_range_and_has_zero(ends, share):
    grid = q.grid_of_range(*ends)
    zero = np.zeros(1, np.float32)
    assert dequantize(q.quantize(zero, grid), grid)[0] == 0
    x = np.float32([ends[0] + share * (ends[1] - ends[0])])
    if ends[1] - ends[0] > 1e-30:
        assert abs(dequantize(q.quantize(x, grid), grid)[0] - x[0]) <= float(grid.scale) * 1.001


def test_range_after_relu_has_zero_point_zero():
    assert q.grid_of_range(0.5, 6.0) == q.Grid(np.float32(6 / 255), 0)
    assert q.grid_of_range(0.0, 0.0) == q.Grid(np.float32(1), 0)


@pytest.mark.parametrize("ends", [(0, np.nan), (-np.inf, 1), (2, 1)])
def test_impossible_range_is_refused(ends):
    with pytest.raises(Refused, match="finite"):
        q.grid_of_range(*ends)


@settings(max_examples=100, deadline=None)
@given(weight=arrays(np.float32, (5, 3, 2), elements=FINITE))
def test_weights_are_within_half_a_step_and_symmetric(weight):
    scales = q.weight_scales(weight)
    integers = q.quantize_weight(weight, scales)
    assert integers.min() >= -127
    np.testing.assert_array_equal(q.quantize_weight(-weight, scales), -integers)
    gap = np.abs(q.dequantize_weight(integers, scales) - weight)
    assert (gap <= scales[:, None, None] * 0.501).all()


def test_channel_of_zeros_has_a_positive_step():
    weight = np.zeros((2, 3), np.float32)
    weight[1, 2] = 2.54
    np.testing.assert_allclose(q.weight_scales(weight), [1.0, 0.02], rtol=1e-6)


def test_bias_fits_int32_even_beside_tiny_weights():
    weight = np.full((1, 4), 1e-12, np.float32)
    bias = np.float32([100.0])
    scales = q.weight_scales(weight, q.bias_floor(bias, 0.01))
    steps = np.float32(0.01) * scales
    stored = q.quantize_bias(bias, steps)
    np.testing.assert_allclose(stored * steps, bias, rtol=1e-5)
    assert abs(int(stored[0])) < 2**31 - 2**20


def test_rounding_to_a_grid_refuses_nan_and_saturates_infinity():
    grid = q.grid_of_range(-1.0, 1.0)
    np.testing.assert_array_equal(q.quantize(np.float32([-np.inf, np.inf]), grid), [0, 255])
    with pytest.raises(Refused, match="finite"):
        q.quantize(np.float32([np.nan]), grid)


def test_bias_correction_moves_the_mean_and_rounds_to_steps():
    rng = np.random.default_rng(2)
    y = rng.standard_normal((64, 3, 4, 4)).astype(np.float32)
    shifted = y + np.float32([0.5, -0.25, 0.0]).reshape(1, 3, 1, 1)
    means = []
    for values in (y, shifted):
        mean = q.ChannelMean(axis=1)
        for part in np.split(values, 4):
            mean.add(part)
        means.append(mean.mean)
    np.testing.assert_allclose(q.bias_correction(*means), [-0.5, 0.25, 0], atol=1e-6)
    np.testing.assert_allclose(means[0], y.mean(axis=(0, 2, 3), dtype=np.float64))
    steps = np.float32([0.2, 0.2, 0.2])
    np.testing.assert_allclose(q.bias_correction(*means, steps), [-0.4, 0.2, 0], atol=1e-6)


def test_relative_error_of_nothing_and_of_something():
    zero = np.zeros(3, np.float32)
    assert q.relative_error(zero, zero) == 0
    assert q.relative_error(zero + 1, zero) == float("inf")
    assert q.relative_error(np.float32([3, 4.5]), np.float32([3, 4])) == pytest.approx(0.1)
