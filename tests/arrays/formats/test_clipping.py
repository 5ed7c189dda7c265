import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sampled_formats import formats, tensors

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import rounded
from penjing.arrays.formats.layout import to_rows
from penjing.arrays.formats.parameters import parameters_of, refuse_unfit
from penjing.core.errors import Refused
from penjing.core.number_format import number_format


def errors(x, format, parameters):
    gap = rounded(x, format, *parameters).astype(np.float64) - x
    return (to_rows(gap, format) ** 2).sum(axis=1)


@settings(max_examples=25)
@given(x=tensors, format=formats)
def test_no_scale_errs_more_than_that_of_the_range(x, format):
    found = clipped_parameters(x, format)
    refuse_unfit(found, x.shape, format)
    plain = errors(x, format, parameters_of(x, format))
    assert (errors(x, format, found) <= plain * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("int2 narrow channel", 2),
        ("int3 channel", 1.3),
        ("uint3 channel", 1.3),
        ("nf4 channel", 1.02),
        ("ternary channel", 1.15),
        ("int4 group 128", 1.1),
    ],
)
def test_clipping_helps_few_bits_of_normal_weights(name, gain):
    x = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    format = number_format(name)
    plain, found = (
        errors(x, format, p).sum() for p in (parameters_of(x, format), clipped_parameters(x, format))
    )
    assert plain / found > gain


def test_ternary_finds_the_known_best_step_of_a_normal_distribution():
    """1.224 standard deviations (Max 1960, "Quantizing for minimum distortion", 3 levels)."""
    x = np.random.default_rng(1).standard_normal((1, 200_000)).astype(np.float32)
    assert clipped_parameters(x, number_format("ternary")).scales == pytest.approx(1.224, abs=0.03)


@given(x=arrays(np.float32, (2, 12), elements=st.floats(-4, 4, width=32)), factor=st.floats(0.5, 2))
def test_the_mean_is_the_best_binary_scale(x, factor):
    format = number_format("binary channel")
    x[:, 0] = 1  # a row of zeros has no best scale
    found = clipped_parameters(x, format)
    other = found._replace(scales=found.scales * np.float32(factor))
    assert (errors(x, format, found) <= errors(x, format, other) * (1 + 1e-6) + 1e-12).all()


@settings(max_examples=10)
@given(x=tensors, format=formats)
def test_torch_finds_scales_as_good(x, format):
    torch = pytest.importorskip("torch")
    here, there = clipped_parameters(x, format), clipped_parameters(torch.from_numpy(x), format)
    scales = there.scales.numpy()
    np.testing.assert_allclose(
        errors(x, format, here._replace(scales=scales)), errors(x, format, here), rtol=1e-5, atol=1e-12
    )


def test_not_finite_weights_are_refused():
    with pytest.raises(Refused, match="finite"):
        clipped_parameters(np.float32([[1, np.nan]]), number_format("int4 channel"))
