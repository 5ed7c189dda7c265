"""The formats are those of runtimes, bit for bit: ONNX Runtime, ml_dtypes, PyTorch, torchao."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from penjing.arrays.formats.coding import decode, encode
from penjing.arrays.formats.layout import to_rows
from penjing.arrays.formats.packing import pack, unpack
from penjing.arrays.formats.tables import table_of
from penjing.core.number_format import number_format

ONNX = {
    "int8": "INT8",
    "uint8": "UINT8",
    "int4": "INT4",
    "uint4": "UINT4",
    "int2": "INT2",
    "uint2": "UINT2",
    "int16": "INT16",
    "uint16": "UINT16",
    "fp8_e4m3": "FLOAT8E4M3FN",
    "fp8_e5m2": "FLOAT8E5M2",
}
STEPS = st.floats(2.0**-20, 2.0**20, width=32)


def session(nodes, inputs, outputs, constants=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def zero_point(kind, code):
    """A constant zero point, with its bits as the file stores them."""
    if kind.startswith("FLOAT"):
        raw = bytes([0])
    else:
        wide = int(kind.lstrip("UINT"))
        raw = pack(np.asarray([code]), wide).tobytes()
    return helper.make_tensor("z", getattr(TensorProto, kind), [], raw, raw=True)


def there_and_back(name, code):
    """A session that quantizes and dequantizes `x` by scale `s`."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["n"]), value("s", TensorProto.FLOAT, [])]
    return session(nodes, inputs, [value("y", TensorProto.FLOAT, ["n"])], [zero_point(ONNX[name], code)])


@pytest.mark.parametrize("name", ONNX)
@pytest.mark.parametrize("place", [0.0, 0.3])
def test_onnx_runtime_rounds_to_the_same_values(name, place):
    format = number_format(name)
    code = int(place * format.highest) if format.kind == "integer" else 0
    if code:
        format = number_format(f"{name} asymmetric") if format.signed else format
    runtime = there_and_back(name, code)

    @settings(max_examples=25)
    @given(x=arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e5, 1e5, width=32)), scale=STEPS)
    def check(x, scale):
        points = None if format.symmetric else np.asarray(code, np.int32)
        got = decode(encode(x, format, np.float32(scale), points))
        want = runtime.run(None, {"x": x, "s": np.asarray(scale, np.float32)})[0]
        np.testing.assert_array_equal(got, want)

    check()


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16"])
def test_onnx_runtime_stores_the_same_codes(name):
    """Of the types that it hands out as NumPy arrays."""
    kind = getattr(TensorProto, ONNX[name])
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    runtime = session(
        [node],
        [value("x", TensorProto.FLOAT, ["n"]), value("s", TensorProto.FLOAT, [])],
        [value("q", kind, ["n"])],
        [zero_point(ONNX[name], 0)],
    )
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20_000) * 10.0 ** rng.uniform(-6, 6, 20_000)).astype(np.float32)
    format = number_format(name)
    got = encode(x, format, np.float32(0.37), None if format.symmetric else np.asarray(0)).codes
    np.testing.assert_array_equal(got, runtime.run(None, {"x": x, "s": np.asarray(0.37, np.float32)})[0])


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_packed_codes_are_the_bytes_of_an_onnx_tensor(name, length):
    format = number_format(name)
    codes = np.random.default_rng(1).integers(format.lowest, format.highest + 1, length)
    packed = pack(codes, format.bits)
    tensor = helper.make_tensor("t", getattr(TensorProto, ONNX[name]), [length], packed.tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int64), codes)
    node = helper.make_node("DequantizeLinear", ["t", "s"], ["y"])
    runtime = session(
        [node], [value("s", TensorProto.FLOAT, [])], [value("y", TensorProto.FLOAT, [length])], [tensor]
    )
    np.testing.assert_array_equal(runtime.run(None, {"s": np.asarray(0.5, np.float32)})[0], codes * 0.5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("fp8_e5m2", ml_dtypes.float8_e5m2),
        ("mxfp4", ml_dtypes.float4_e2m1fn),
    ],
)
def test_every_code_of_a_float_has_its_value(kind, dtype):
    table = table_of(kind)
    want = np.arange(len(table.values), dtype=np.uint8).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(table.values, want)
    assert np.array_equal(np.signbit(table.values[~np.isnan(want)]), np.signbit(want[~np.isnan(want)]))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", ml_dtypes.float8_e4m3fn), ("fp8_e5m2", ml_dtypes.float8_e5m2)]
)
@settings(max_examples=50)
@given(x=arrays(np.float32, 50, elements=st.floats(-500, 500, width=32)))
def test_floats_round_as_ml_dtypes_and_torch_do(name, dtype, x):
    torch = pytest.importorskip("torch")
    largest = float(ml_dtypes.finfo(dtype).max)
    codes = encode(x, number_format(name), 1.0).codes
    clipped = np.clip(x, -largest, largest)
    np.testing.assert_array_equal(codes, clipped.astype(dtype).view(np.uint8))
    kind = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    np.testing.assert_array_equal(codes, torch.from_numpy(clipped).to(kind).view(torch.uint8).numpy())


@settings(max_examples=50)
@given(x=arrays(np.float32, (2, 32), elements=st.floats(-8, 8, width=32)))
def test_fp4_rounds_as_ml_dtypes_does(x):
    format = number_format("mxfp4")
    codes = encode(x, format, np.ones((2, 1), np.float32)).codes
    np.testing.assert_array_equal(codes, np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def some_blocks(torch, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((16, 128)) * 2.0 ** rng.integers(-6, 7, (16, 1))
    x[0, :32] = 4.0  # magnitudes at powers of two
    return x.astype(np.float32), torch.from_numpy(x.astype(np.float32))


@pytest.mark.filterwarnings("ignore")  # what torchao warns of on import is not ours
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8_e5m2"])
def test_mx_formats_are_those_of_torchao(name):
    torch = pytest.importorskip("torch")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    kinds = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2}
    x, tensor = some_blocks(torch)
    scale, data = mx.to_mx(tensor, kinds[name], 32)
    encoded = encode(x, number_format(name))
    np.testing.assert_array_equal(
        encoded.scales, np.exp2(scale.view(torch.uint8).numpy().astype(np.float32) - 127)
    )
    codes = pack(encoded.codes, 4) if name == "mxfp4" else encoded.codes
    np.testing.assert_array_equal(codes, data.view(torch.uint8).numpy().reshape(codes.shape))


@pytest.mark.filterwarnings("ignore")
def test_nvfp4_is_that_of_torchao():
    torch = pytest.importorskip("torch")
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x, tensor = some_blocks(torch, 1)
    encoded = encode(x, number_format("nvfp4"))
    whole = torch.tensor(float(encoded.tensor_scale))
    assert float(whole) == pytest.approx(np.abs(x).max() / (6 * 448), rel=1e-6)
    there = nv.NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=whole)
    np.testing.assert_array_equal(
        encoded.scales, there.scale.to(torch.float32).numpy().reshape(encoded.scales.shape)
    )
    np.testing.assert_array_equal(pack(encoded.codes, 4), there.qdata.view(torch.uint8).numpy())
    np.testing.assert_allclose(decode(encoded), there.dequantize(torch.float32).numpy(), rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits_multiplies_by_the_decoded_weight(bits, symmetric):
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((6, 64)).astype(np.float32)
    format = number_format(f"{'int' if symmetric else 'uint'}{bits} group 32")
    encoded = encode(weight, format)
    codes = encoded.codes.astype(np.int32) + (2 ** (bits - 1) if symmetric else 0)
    packed = pack(to_rows(codes, format).reshape(6, 2, 32), bits)
    constants = [onnx.numpy_helper.from_array(packed, "b"), onnx.numpy_helper.from_array(encoded.scales, "s")]
    if not symmetric:
        constants.append(onnx.numpy_helper.from_array(pack(encoded.zero_points, bits).reshape(-1), "z"))
    node = helper.make_node(
        "MatMulNBits",
        ["x", "b", "s"] + ["z"] * (not symmetric),
        ["y"],
        K=64,
        N=6,
        domain="com.microsoft",
        bits=bits,
        block_size=32,
        accuracy_level=1,
    )
    runtime = session(
        [node], [value("x", TensorProto.FLOAT, [3, 64])], [value("y", TensorProto.FLOAT, [3, 6])], constants
    )
    x = rng.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(runtime.run(None, {"x": x})[0], x @ decode(encoded).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=8)
@given(data=st.data(), shape=st.tuples(st.integers(1, 3), st.integers(0, 21)))
def test_packing_and_unpacking_gives_the_codes(bits, signed, data, shape):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    codes = data.draw(arrays(np.int32, shape, elements=st.integers(low, high)))
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, shape[1], signed), codes)
