import array_api_compat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sampled_formats import FORMATS, formats, tensors

from penjing.arrays.formats.coding import Encoded, decode, encode, rounded
from penjing.arrays.formats.layout import from_rows, row_lengths, to_rows
from penjing.arrays.formats.parameters import parameters_of, parameters_of_range, refuse_unfit
from penjing.core.errors import Refused
from penjing.core.number_format import number_format


def each_value(parameter, x, format):
    """What each scale has, as an array of the tensor's shape."""
    rows = np.broadcast_to(np.reshape(parameter, (-1, 1)), to_rows(x, format).shape)
    return from_rows(rows, format, x.shape)


@settings(max_examples=120)
@given(x=tensors, format=formats)
def test_rounding_what_is_rounded_changes_nothing(x, format):
    encoded = encode(x, format)
    once = decode(encoded)
    again = encode(once, format, *encoded.parameters)
    np.testing.assert_array_equal(decode(again), once)
    if format.kind not in ("fp8_e4m3", "fp8_e5m2", "mxfp4", "mxfp8", "mxfp8_e5m2", "nvfp4"):  # two zeros
        np.testing.assert_array_equal(again.codes, encoded.codes)
    assert once.dtype == np.float32
    assert once.shape == x.shape


@settings(max_examples=120)
@given(x=tensors, format=formats)
def test_fake_quantization_is_encode_and_decode(x, format):
    np.testing.assert_array_equal(rounded(x, format), decode(encode(x, format)))


@settings(max_examples=100)
@given(x=tensors, format=formats)
def test_codes_are_within_their_range(x, format):
    encoded = encode(x, format)
    assert encoded.codes.min() >= format.lowest
    assert encoded.codes.max() <= format.highest
    assert encoded.codes.dtype == (
        np.dtype(f"{'int' if format.lowest < 0 else 'uint'}{8 if format.bits <= 8 else 16}")
    )
    assert tuple(np.shape(encoded.scales)) == format.scale_shape(x.shape)
    refuse_unfit(encoded.parameters, x.shape, format)


@settings(max_examples=100)
@given(x=tensors, format=st.sampled_from([f for f in FORMATS if f.kind == "integer"]))
def test_integers_err_by_half_a_step_at_most_and_hold_zero(x, format):
    if not format.signed and format.symmetric:
        x = np.abs(x)
    x[..., 0] = 0
    parameters = parameters_of(x, format)
    steps = each_value(parameters.steps, x, format)
    zero = 0 if parameters.zero_points is None else each_value(parameters.zero_points, x, format).astype(int)
    inside = np.clip(x, (format.lowest - zero) * steps, (format.highest - zero) * steps)
    half = steps * 0.5005 + np.abs(x) * 1e-6
    got = rounded(x, format)
    assert (np.abs(got - inside) <= half).all()
    assert (np.abs(inside - x) <= (0 if format.symmetric else half) + np.abs(x) * 1e-6).all()
    assert (got[..., 0] == 0).all()


@settings(max_examples=120)
@given(x=tensors, format=formats)
def test_no_value_of_a_table_is_nearer(x, format):
    """Against a search through all values that codes have."""
    if format.bits > 8:
        return
    parameters = parameters_of(x, format)
    rows, steps = to_rows(x, format), np.reshape(parameters.steps, (-1, 1)).astype(np.float64)
    codes = np.arange(format.lowest, format.highest + 1)
    grid = values_by_code(codes, parameters, format)
    best = np.abs(grid[:, None, :] * steps[:, :, None] - rows[:, :, None]).min(axis=2)
    gap = np.abs(to_rows(rounded(x, format, *parameters), format).astype(np.float64) - rows)
    inside = to_rows(np.ones_like(x), format) > 0
    assert (gap <= best + np.abs(rows) * 1e-6 + 1e-12)[inside].all()


def values_by_code(codes, parameters, format):
    """Finite values in steps of every code, `[scales, codes]`."""
    from penjing.arrays.formats.tables import table_of

    table = table_of(format.kind)
    if table is not None:
        return np.tile(
            table.values[np.isfinite(table.values)].astype(np.float64), (np.size(parameters.scales), 1)
        )
    if format.kind == "binary":
        return np.tile([-1.0, 1.0], (np.size(parameters.scales), 1))
    zero = 0 if parameters.zero_points is None else np.reshape(parameters.zero_points, (-1, 1)).astype(int)
    return (codes[None] - zero) * np.ones((np.size(parameters.scales), 1))


@settings(max_examples=100)
@given(x=arrays(np.float32, 60, elements=st.floats(-8, 8, width=32)), format=formats)
def test_rounding_is_monotone(x, format):
    x = np.sort(x).reshape(1, -1)
    if format.granularity == "group":
        x = x[:, :4] if format.group == 4 else x[:, : format.group]
    assert (np.diff(rounded(x, format)) >= 0).all()


@settings(max_examples=120)
@given(
    x=tensors,
    format=st.sampled_from([f for f in FORMATS if f.narrow or f.kind not in ("integer", "nf4", "binary")]),
)
def test_symmetric_formats_are_odd(x, format):
    np.testing.assert_array_equal(rounded(-x, format), -rounded(x, format))


@settings(max_examples=100)
@given(x=tensors, format=formats)
def test_torch_agrees_with_numpy(x, format):
    torch = pytest.importorskip("torch")
    here, there = encode(x, format), encode(torch.from_numpy(x), format)
    np.testing.assert_array_equal(there.codes.numpy(), here.codes)
    np.testing.assert_array_equal(there.scales.numpy(), here.scales)
    if here.zero_points is not None:
        np.testing.assert_array_equal(there.zero_points.numpy(), here.zero_points)
    np.testing.assert_array_equal(decode(there).numpy(), decode(here))
    np.testing.assert_array_equal(rounded(torch.from_numpy(x), format).numpy(), decode(here))
    assert array_api_compat.is_torch_array(there.codes)


def test_a_shorter_last_group_has_a_scale_of_its_own():
    x = np.float32([[1, 2, 3, 4, 50, 60], [0, 0, 0, -7, 1, 1]])
    encoded = encode(x, number_format("int4 narrow group 4"))
    np.testing.assert_allclose(encoded.scales, np.float32([[4 / 7, 60 / 7], [1, 1 / 7]]))
    np.testing.assert_allclose(decode(encoded), rounded(x, encoded.format))
    np.testing.assert_array_equal(row_lengths(x, encoded.format)[:, 0], [4, 2, 4, 2])
    binary = rounded(x, number_format("binary group 4"))
    np.testing.assert_allclose(binary[:, 4:], [[55, 55], [1, 1]])


def test_kernels_are_flattened_behind_the_input_axis():
    x = np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype(np.float32)
    format = number_format("int4 group 8")
    np.testing.assert_array_equal(rounded(x, format), rounded(x.reshape(3, 16), format).reshape(x.shape))


def test_a_range_of_zeros_has_step_one():
    for format in FORMATS:
        encoded = encode(np.zeros((2, 20), np.float32), format)
        assert np.abs(decode(encoded)).max() < 1e-37  # binary has no zero
        if format.kind != "binary":
            np.testing.assert_array_equal(encoded.scales, np.ones_like(encoded.scales))
            assert not decode(encoded).any()


def test_zeros_beside_small_values_do_not_coarsen_nvfp4():
    x = np.zeros((2, 16), np.float32)
    x[0] = np.linspace(-1e-6, 1e-6, 16)
    got = rounded(x, number_format("nvfp4"))
    assert np.abs(got - x).max() < 2e-7
    assert not got[1].any()


def test_integers_of_given_scales_saturate_and_halves_go_to_even():
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300])
    encoded = encode(x, number_format("int8"), 1.0)
    np.testing.assert_array_equal(encoded.codes, [0, 2, 2, 0, -2, 127, -128])
    np.testing.assert_array_equal(encode(x, number_format("uint8"), 1.0, 3).codes, [3, 5, 5, 3, 1, 255, 0])


def test_rounding_inside_a_network_keeps_nan_and_saturates_infinity():
    x = np.float32([np.nan, np.inf, -np.inf])
    for name, low, high in [
        ("int4", -8, 7),
        ("fp8_e4m3", -448, 448),
        ("nf4 tensor", -1, 1),
        ("binary", -1, 1),
    ]:
        np.testing.assert_array_equal(rounded(x, number_format(name), 1.0), [np.nan, high, low])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_refused(bad):
    x = np.float32([[1, bad], [bad, 2]])
    with pytest.raises(Refused, match="2 NaN or infinite"):
        encode(x, number_format("int8"))
    with pytest.raises(Refused, match="2 NaN or infinite"):
        encode(x, number_format("nf4 tensor"), 1.0)
    with pytest.raises(Refused, match="finite"):
        rounded(x, number_format("int8"))


@pytest.mark.parametrize(
    ("name", "scales", "points", "whole", "rule"),
    [
        ("int8 channel", np.ones(3, np.float32), None, None, "scales have shape"),
        ("int8", -1.0, None, None, "positive"),
        ("int8", float("nan"), None, None, "positive"),
        ("mxfp4", np.full((2, 1), 3, np.float32), None, None, "powers of two"),
        ("nvfp4", np.full((2, 1), 1.03, np.float32), None, np.float32(1), "values of E4M3"),
        ("nvfp4", np.ones((2, 1), np.float32), None, None, "tensor scale"),
        ("int8", 1.0, 0, None, "asymmetric formats only"),
        ("uint8", 1.0, None, None, "asymmetric formats only"),
        ("uint8", 1.0, 256, None, "from 0 to 255"),
        ("int8", None, 3, None, "need scales"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(name, scales, points, whole, rule):
    with pytest.raises(Refused, match=rule):
        rounded(np.ones((2, 4), np.float32), number_format(name), scales, points, whole)


def test_negative_values_are_refused_where_there_are_none():
    with pytest.raises(Refused, match="at least 0"):
        encode(np.float32([-1, 2]), number_format("uint8 symmetric"))
    np.testing.assert_array_equal(
        rounded(np.float32([-1, 255]), number_format("uint8 symmetric"), 1.0), [0, 255]
    )


@pytest.mark.parametrize("ends", [(0.0, np.nan), (-np.inf, 1.0), (2.0, 1.0)])
def test_impossible_ranges_are_refused(ends):
    with pytest.raises(Refused, match="finite and in order"):
        parameters_of_range(*ends, number_format("int8"))


def test_an_encoded_tensor_with_foreign_scales_is_refused():
    encoded = encode(np.ones((2, 4), np.float32), number_format("int8 channel"))
    with pytest.raises(Refused, match="shape"):
        decode(Encoded(encoded.codes, encoded.scales[:1], None, encoded.format))
