import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from penjing.arrays.formats.coding import rounded
from penjing.arrays.formats.parameters import parameters_of, parameters_of_range
from penjing.arrays.observers.choices import entropy_range, mse_range, percentile_range
from penjing.arrays.observers.extremes import Extremes
from penjing.arrays.observers.histogram import Histogram
from penjing.arrays.observers.observer import Observer
from penjing.core.errors import Refused
from penjing.core.number_format import number_format

TENSOR = number_format("uint8")
KINDS = ["minmax", "moving_average", "percentile", "mse", "entropy"]
VALUES = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-30, -1e-30, 1e30, 0.5, 1.0, -2.0])
BATCHES = st.lists(arrays(np.float32, st.integers(1, 30), elements=VALUES), min_size=1, max_size=6)


def filled(x, format=TENSOR, **more):
    histogram = Histogram(format, **more)
    histogram.add(x)
    return histogram


def normal(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def error(x, ends, format=TENSOR):
    return np.mean((rounded(x, format, *parameters_of_range(*ends, format)) - x) ** 2)


@settings(max_examples=80)
@given(batches=BATCHES, bins=st.sampled_from([2, 3, 16, 64]))
def test_a_histogram_does_not_depend_on_batches_or_their_order(batches, bins):
    one, many, reverse = (
        Histogram(TENSOR, bins=bins),
        Histogram(TENSOR, bins=bins),
        Histogram(TENSOR, bins=bins),
    )
    one.add(np.concatenate(batches))
    for part in batches:
        many.add(part)
    for part in batches[::-1]:
        reverse.add(part)
    for other in (many, reverse):
        for name in ("counts", "first", "exponent", "low", "high", "zeros"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name))


@settings(max_examples=80)
@given(x=arrays(np.float32, st.integers(1, 60), elements=VALUES), bins=st.sampled_from([2, 7, 64]))
def test_a_histogram_counts_each_value_between_its_edges(x, bins):
    histogram = filled(x, bins=bins)
    edges = histogram.edges[0]
    want = [np.count_nonzero((x >= a) & (x < b)) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(histogram.counts[0], want)
    assert histogram.counts.sum() == x.size
    assert histogram.zeros[0] == np.count_nonzero(x == 0)
    assert (histogram.low[0], histogram.high[0]) == (x.min(), x.max())
    assert (np.diff(histogram.centers[0]) >= 0).all()


def test_half_of_the_bins_are_in_use_and_zero_is_an_edge():
    for x in (normal(1000), np.abs(normal(1000)), normal(1000) + 50):
        histogram = filled(x)
        inside = (histogram.edges[0, 1:] > x.min()) & (histogram.edges[0, :-1] <= x.max())
        assert inside.sum() >= histogram.bins / 2
        assert np.isin(0, histogram.edges[0]) or x.min() > 0


def rows_alone(x, format, name):
    """What a histogram of each row by itself says."""
    each = [getattr(filled(row), name)[0] for row in x]
    return np.stack(each)


@pytest.mark.parametrize(
    ("name", "shape"), [("uint8 channel", (3,)), ("uint8 token", (3,)), ("uint8 group 20", (3, 1))]
)
def test_each_scale_has_a_histogram_of_its_own(name, shape):
    x = normal((3, 20)) * np.float32([[1], [100], [0]])
    histogram = filled(x, number_format(name))
    assert histogram.shape == shape
    np.testing.assert_array_equal(histogram.counts, rows_alone(x, name, "counts"))
    np.testing.assert_array_equal(histogram.edges, rows_alone(x, name, "edges"))
    low, high = mse_range(histogram, number_format(name))
    assert low.shape == high.shape == shape
    assert np.ravel(high)[1] > 10 * np.ravel(high)[0]
    assert (np.ravel(low)[2], np.ravel(high)[2]) == (0, 0)


def test_a_shorter_last_group_has_no_values_but_its_own():
    x = np.float32([[1, 2, 3, 4, 5, 6]])
    format = number_format("uint8 group 4")
    extremes = Extremes(format)
    extremes.add(x)
    np.testing.assert_array_equal(extremes.low, [[1, 5]])
    np.testing.assert_array_equal(filled(x, format).counts.sum(axis=1), [4, 2])


def test_channels_lie_along_the_axis_that_is_named():
    x = normal((4, 3, 5, 5)) * np.float32([1, 10, 100]).reshape(1, 3, 1, 1)
    for kind in KINDS:
        observer = Observer(kind, number_format("uint8 channel"), axis=1)
        observer.add(x)
        low, high = observer.range()
        assert high.shape == (3,)
        assert high[0] < high[1] < high[2]
        assert observer.parameters().scales.shape == (3,)
        assert (low <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(x=arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)))
def test_every_observer_stays_within_what_it_saw_and_repeats_itself(kind, x):
    ends = []
    for _ in range(2):
        observer = Observer(kind, TENSOR)
        observer.add(x)
        observer.add(x[:0])
        ends.append(observer.range())
    assert ends[0] == ends[1]
    low, high = ends[0]
    assert min(x.min(), 0) <= low <= high <= max(x.max(), 0)


def test_minmax_has_the_parameters_of_the_data():
    x = normal((5, 16))
    for name in ("int8", "uint4", "int4 narrow channel", "mxfp4", "fp8_e4m3 token"):
        observer = Observer("minmax", number_format(name))
        observer.add(x)
        want = parameters_of(x, number_format(name))
        np.testing.assert_array_equal(observer.parameters().scales, want.scales)


def test_a_moving_average_begins_with_the_first_batch_and_moves():
    observer = Observer("moving_average", TENSOR, momentum=0.75)
    observer.add(np.float32([-1, 4]))
    assert observer.range() == (-1, 4)
    observer.add(np.float32([-5, 8]))
    assert observer.range() == (-2, 5)


def test_percentiles_are_those_of_the_data():
    x = normal(100_000)
    low, high = percentile_range(filled(x), 99)
    assert low == pytest.approx(np.quantile(x, 0.005), abs=0.01)
    assert high == pytest.approx(np.quantile(x, 0.995), abs=0.01)
    assert percentile_range(filled(x), 100) == (x.min(), x.max())


def test_an_outlier_is_cut_off_and_the_error_falls():
    x = np.append(normal(100_000), np.float32(60))
    full = error(x, (x.min(), x.max()))
    low, high = percentile_range(filled(x), 99.9)
    assert -5 < low < -3
    assert 3 < high < 5
    low, high = mse_range(filled(x), TENSOR)
    assert error(x, (low, high)) < 0.9 * full
    assert low < -4, "the end without outliers stays"
    low, high = entropy_range(filled(x, bins=8192), number_format("int8"))
    assert 3 < high < 8


@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "fp8_e4m3", "nf4", "ternary"])
def test_mse_is_near_the_best_range_of_a_search_on_the_data_themselves(name):
    x, format = normal(5000, 3), number_format(f"{name} tensor")
    best = min(error(x, (max(x.min(), -t), min(x.max(), t)), format) for t in np.linspace(0.3, 5, 200))
    assert error(x, mse_range(filled(x), format), format) < 1.02 * best


def test_fewer_bits_are_clipped_more():
    histogram = filled(normal(100_000), bins=8192)
    for choose in (mse_range, entropy_range):
        wide, narrow = (choose(histogram, number_format(name))[1] for name in ("int8", "int4"))
        assert narrow < 0.95 * wide


def test_ranges_that_begin_at_zero_stay_there_and_zeros_do_not_sway_entropy():
    x = np.maximum(normal(20_000, 1), 0)
    for choose in (percentile_range, lambda h: mse_range(h, TENSOR), lambda h: entropy_range(h, TENSOR)):
        assert choose(filled(x, bins=4096))[0] == 0
    more = np.append(x, np.zeros(100_000, np.float32))
    assert entropy_range(filled(more, bins=4096), TENSOR) == entropy_range(filled(x, bins=4096), TENSOR)


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_the_range_of_a_constant(kind, value):
    observer = Observer(kind, TENSOR)
    observer.add(np.full(10, value, np.float32))
    low, high = observer.range()
    assert low <= high
    parameters = observer.parameters()
    assert parameters.scales > 0
    if kind != "entropy":  # which only sees how values spread
        assert rounded(np.float32([value]), TENSOR, *parameters)[0] == pytest.approx(value, rel=0.01)


def test_entropy_agrees_with_a_plain_loop():
    """The algorithm of the slides, bin by bin, for one magnitude."""
    from penjing.arrays.observers.choices import _divergence

    rng = np.random.default_rng(4)
    counts = rng.integers(0, 5, 40).astype(float)
    levels = np.arange(40) // 7
    inside = np.zeros(40, bool)
    inside[3:33] = True
    kept = np.where(inside, counts, 0)
    data = kept.copy()
    filled_bins = np.flatnonzero(kept)
    data[filled_bins[0]] += counts[: filled_bins[0]].sum()
    data[filled_bins[-1]] += counts[filled_bins[-1] + 1 :].sum()
    spread = np.zeros(40)
    for level in range(6):
        members = [i for i in filled_bins if levels[i] == level]
        spread[members] = kept[members].sum() / max(len(members), 1)
    p, q = data / data.sum(), spread / spread.sum()
    want = sum(p[i] * np.log(p[i] / q[i]) for i in filled_bins)
    got = _divergence(
        np.stack([counts, counts]), np.stack([inside, ~inside & False]), np.stack([levels] * 2), 6
    )
    assert got[0] == pytest.approx(want)
    assert got[1] == np.inf


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_refused_and_counted(kind):
    observer = Observer(kind, TENSOR)
    observer.add(np.float32([1, -2]))
    with pytest.raises(Refused, match="2 NaN or infinite"):
        observer.add(np.float32([np.nan, np.inf, 0]))
    with pytest.raises(Refused, match="1 NaN or infinite"):
        observer.add(np.float64([1e300, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_observed_is_refused(kind):
    with pytest.raises(Refused, match="must have seen data"):
        Observer(kind, TENSOR).range()
    tokens = Observer(kind, number_format("uint8 token"))
    tokens.add(normal((2, 8)))
    with pytest.raises(Refused, match="the scales of all batches must have one shape"):
        tokens.add(normal((3, 8)))


def test_settings_out_of_range_are_refused():
    with pytest.raises(Refused, match="Did you mean 'minmax'"):
        Observer("minmx", TENSOR)
    with pytest.raises(Refused, match="momentum"):
        Observer("moving_average", TENSOR, momentum=1.0)
    with pytest.raises(Refused, match="percentile"):
        Observer("percentile", TENSOR, percentile=100.1)
    with pytest.raises(Refused, match="16 bins for each code"):
        Observer("entropy", number_format("int10"))
    with pytest.raises(Refused, match="percentile"):
        percentile_range(filled(normal(10)), 50)
    with pytest.raises(Refused, match="16 bins for each code"):
        entropy_range(filled(normal(10)), number_format("int16"))
    with pytest.raises(Refused, match="fit into memory"):
        filled(normal((40_000, 4)), number_format("uint8 channel"))
    with pytest.raises(Refused, match="at least 2 bins"):
        Histogram(TENSOR, bins=1)
