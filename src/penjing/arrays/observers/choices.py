"""From a histogram to the range that is worth keeping: by percentile, by squared error, by divergence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.formats.coding import encode, rounded
from penjing.arrays.formats.parameters import parameters_of_range
from penjing.arrays.observers.histogram import Floats, Histogram
from penjing.core.errors import Refused
from penjing.core.number_format import NumberFormat

Range = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Low and high ends, of the scales' shape."""

SHARES = tuple(0.97**step for step in range(116))
"""Of the largest magnitude, down to 3%: what is beyond is clipped at either end."""

BINS_A_CODE = 16
"""Fewest bins of a histogram for each code that entropy needs, as in TensorRT (2,048 for 128)."""


def percentile_range(histogram: Histogram, percentile: float = 99.99) -> Range:
    """Return the range that cuts (100 - percentile)% of the values off, half at each end.

    An end that lies at 0 (after a ReLU) stays there. Wu et al. 2020, "Integer quantization for deep
    learning inference", recommend 99.99% and above for activations.

    Args:
        histogram: with data.
        percentile: in (50, 100]; as fine as a bin.
    """
    refuse_percentile(percentile)
    seen, edges = np.cumsum(histogram.counts, axis=1), histogram.edges
    total = seen[:, -1:]
    tail = (1 - percentile / 100) / 2
    first = (seen <= tail * total).sum(axis=1)
    last = (seen < (1 - tail) * total).sum(axis=1)
    row = np.arange(len(seen))
    low = np.where(histogram.low >= 0, histogram.low, np.maximum(edges[row, first], histogram.low))
    high = np.where(histogram.high <= 0, histogram.high, np.minimum(edges[row, last + 1], histogram.high))
    return _shaped(histogram, low, high)


def mse_range(histogram: Histogram, format: NumberFormat) -> Range:
    """Return the range, clipped at a magnitude, with the least mean squared error of rounding.

    The search over clipped ranges is that of Nagel et al. 2021, "A White Paper on Neural Network
    Quantization", section 3.1; the error is estimated from the histogram.

    Args:
        histogram: with data.
        format: that values will be rounded to, with a scale for each row of the histogram.
    """
    by_row = _by_row(format)
    centers = histogram.centers.astype(np.float32)
    best = np.ones(len(centers))
    least = np.full(len(centers), np.inf)
    for share in SHARES:
        parameters = parameters_of_range(*_clipped(histogram, share), by_row)
        gap = (rounded(centers, by_row, *parameters) - centers).astype(np.float64)
        error = np.einsum("sb,sb,sb->s", gap, gap, histogram.counts)
        best, least = np.where(error < least, share, best), np.minimum(error, least)
    return _shaped(histogram, *_clipped(histogram, best))


def entropy_range(histogram: Histogram, format: NumberFormat) -> Range:
    """Return the range, clipped at a magnitude, whose rounded values have the distribution nearest to all.

    Least Kullback-Leibler divergence from the data P, with clipped values at the ends, to Q, in which the
    values of each code are spread evenly over its bins that are not empty: Migacz 2017, "8-bit inference
    with TensorRT". Different from copies of it, to be exact: bins belong to the code that they really round
    to; clipped values go to the outermost bin inside that is not empty, so that the divergence is finite
    without a smoothing constant; exact zeros, which every code book holds, do not count (NVIDIA's
    pytorch-quantization replaces the bin of zeros for that reason).

    Args:
        histogram: with data; of at least `BINS_A_CODE` bins for each code.
        format: that values will be rounded to, with a scale for each row of the histogram.

    Raises:
        Refused: too few bins.
    """
    refuse_few_bins(histogram.bins, format)
    by_row = _by_row(format)
    counts = _without_zeros(histogram)
    best = np.ones(len(counts))
    least = np.full(len(counts), np.inf)
    for share in SHARES:
        low, high = _clipped(histogram, share)
        inside = (histogram.centers >= low[:, None]) & (histogram.centers <= high[:, None])
        codes = encode(histogram.centers, by_row, *parameters_of_range(low, high, by_row)).codes
        levels = codes.astype(np.int64) - format.lowest
        error = _divergence(counts, inside, levels, 2**format.bits)
        error[inside.sum(axis=1) < (2**format.bits if share < 1 else 0)] = np.inf
        best, least = np.where(error < least, share, best), np.minimum(error, least)
    return _shaped(histogram, *_clipped(histogram, best))


def refuse_percentile(percentile: float) -> None:
    """Refuse a percentile that `percentile_range` cannot take."""
    if not 50 < percentile <= 100:
        raise Refused(
            "the percentile must be above 50 and at most 100",
            value=percentile,
            place="observer",
            fix="choose for example 99.99",
        )


def refuse_few_bins(bins: int, format: NumberFormat) -> None:
    """Refuse a histogram that is too coarse for `entropy_range`."""
    if BINS_A_CODE * 2**format.bits > bins:
        raise Refused(
            f"the observer entropy needs {BINS_A_CODE} bins for each code",
            value=f"{bins} bins",
            place=str(format),
            fix="use the observer mse",
        )


def _clipped(histogram: Histogram, share: float | Floats) -> tuple[Floats, Floats]:
    """Return both ends of each row, within a share of its largest magnitude."""
    limit = np.maximum(np.abs(histogram.low), np.abs(histogram.high)) * share
    return np.clip(histogram.low, -limit, limit), np.clip(histogram.high, -limit, limit)


def _without_zeros(histogram: Histogram) -> Floats:
    counts = histogram.counts.astype(np.float64)
    zero = -histogram.first
    rows = np.flatnonzero(histogram.zeros)
    counts[rows, zero[rows]] -= histogram.zeros[rows]
    return counts


def _divergence(counts: Floats, inside: NDArray[np.bool_], levels: NDArray[np.int64], most: int) -> Floats:
    """Return KL(P, Q) of each row, `[scales]`; infinite where nothing is inside.

    Args:
        counts: `[scales, bins]`.
        inside: which bins the range holds.
        levels: the code of each bin, from 0 to `most` - 1.
        most: how many codes there are.
    """
    kept = np.where(inside, counts, 0.0)
    filled = kept > 0
    data = kept.copy()
    some = np.flatnonzero(filled.any(axis=1))
    start, end = filled.argmax(axis=1), filled.shape[1] - 1 - filled[:, ::-1].argmax(axis=1)
    seen, total = np.cumsum(counts, axis=1), counts.sum(axis=1)
    data[some, start[some]] += seen[some, start[some]] - kept[some, start[some]]
    data[some, end[some]] += total[some] - seen[some, end[some]]
    flat = (levels + most * np.arange(len(levels))[:, None])[filled]
    size = most * len(levels)
    mean = np.bincount(flat, kept[filled], size) / np.maximum(np.bincount(flat, minlength=size), 1)
    p = data / np.maximum(total, 1)[:, None]
    q = mean[flat] / np.maximum(kept.sum(axis=1), 1)[np.nonzero(filled)[0]]
    found = np.full(len(counts), np.inf)
    found[some] = 0.0
    np.add.at(found, np.nonzero(filled)[0], p[filled] * np.log(p[filled] / q))
    return found


def _by_row(format: NumberFormat) -> NumberFormat:
    """Return the format with one scale for each row of a matrix."""
    return format.model_copy(update={"granularity": "channel", "group": 0})


def _shaped(histogram: Histogram, low: Any, high: Any) -> Range:
    assert histogram.shape is not None
    return low.reshape(histogram.shape), high.reshape(histogram.shape)
