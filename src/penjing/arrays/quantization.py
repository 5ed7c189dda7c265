"""Integer grids: ranges of values, scales and zero points, rounding, and bias correction, on NumPy arrays.

The rounding is that of ONNX's QuantizeLinear and DequantizeLinear, bit for bit in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused

Floats = NDArray[np.float32]

BINS = 2048
INT32_BIAS_LIMIT = 2.0**30
"""Largest magnitude of an int32 bias: half of the type's range is left for the sum of products."""


@dataclass(frozen=True)
class Grid:
    """An 8-bit unsigned grid: real value = (integer - zero_point) * scale, integers 0 to 255.

    Attributes:
        scale: step between two neighbours, float32, above 0.
        zero_point: the integer that stands for exactly 0, from 0 to 255.
    """

    scale: np.float32
    zero_point: int

    @property
    def low(self) -> float:
        """Smallest real value on the grid."""
        return -float(self.scale) * self.zero_point

    @property
    def high(self) -> float:
        """Largest real value on the grid."""
        return float(self.scale) * (255 - self.zero_point)


def grid_of_range(low: float, high: float) -> Grid:
    """Return the asymmetric unsigned grid that covers [low, high] and has 0 on it.

    The range is widened to hold 0, so that padding and ReLU are exact (Jacob et al. 2018,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference").
    A range of no width at 0 gives the grid of step 1.

    Raises:
        Refused: the range is not finite or is reversed.

    >>> grid_of_range(0.0, 2.55).zero_point
    0
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise Refused("a range of activations is finite", value=f"[{low}, {high}]", place="calibration",
                      fix="remove NaN and infinite values from the calibration data")  # fmt: skip
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = np.float32((high - low) / 255)
    if scale < np.finfo(np.float32).tiny:
        return Grid(np.float32(1), 0)
    return Grid(scale, int(np.clip(np.rint(-low / float(scale)), 0, 255)))


def quantize(x: Floats, grid: Grid) -> NDArray[np.uint8]:
    """Round to the nearest integer of the grid, half to even, saturating at 0 and 255."""
    with np.errstate(over="ignore"):  # an infinite number of steps saturates like a large one
        steps = np.rint(np.asarray(x, np.float32) / grid.scale)
    clipped = np.clip(steps, -grid.zero_point, 255 - grid.zero_point)
    integers: NDArray[np.uint8] = (clipped + grid.zero_point).astype(np.uint8)
    return integers


def dequantize(q: NDArray[np.uint8], grid: Grid) -> Floats:
    """Return the real values of integers on the grid, float32."""
    return (q.astype(np.int32) - grid.zero_point).astype(np.float32) * grid.scale


def weight_scales(weight: Floats, floor: Floats | None = None) -> Floats:
    """Return the step of every output channel of a weight `[out, ...]` for integers from -127 to 127.

    Args:
        weight: any shape, output channels first.
        floor: smallest step allowed for each channel, for a bias that must fit int32.

    Per-channel symmetric scales are Krishnamoorthi 2018 ("Quantizing deep convolutional networks for
    efficient inference"). A channel of zeros has step 1.
    """
    largest = np.abs(weight.reshape(weight.shape[0], -1)).max(axis=1, initial=0.0)
    scales = (largest / 127).astype(np.float32)
    if floor is not None:
        scales = np.maximum(scales, floor.astype(np.float32))
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def quantize_weight(weight: Floats, scales: Floats) -> NDArray[np.int8]:
    """Round a weight `[out, ...]` to -127..127 with one step for every output channel."""
    steps = weight / scales.reshape(-1, *[1] * (weight.ndim - 1))
    integers: NDArray[np.int8] = np.clip(np.rint(steps), -127, 127).astype(np.int8)
    return integers


def dequantize_weight(q: NDArray[np.int8], scales: Floats) -> Floats:
    """Return the real values of an integer weight `[out, ...]`, float32."""
    return q.astype(np.float32) * scales.reshape(-1, *[1] * (q.ndim - 1))


def bias_floor(bias: Floats, input_scale: float) -> Floats:
    """Return the smallest weight steps for which a bias in steps of input x weight fits int32."""
    return (np.abs(bias) / (np.float64(input_scale) * INT32_BIAS_LIMIT)).astype(np.float32)


def quantize_bias(bias: Floats, scales: Floats) -> NDArray[np.int32]:
    """Round a bias `[out]` to int32 with steps `[out]` (scale of the input times that of the weight)."""
    steps = np.rint(bias.astype(np.float64) / scales.astype(np.float64))
    return np.clip(steps, -(2.0**31), 2.0**31 - 1).astype(np.int32)


def relative_error(value: Floats, reference: Floats) -> float:
    """Return the L2 norm of the difference over that of the reference; 0 for two arrays of zeros.

    >>> relative_error(np.float32([1.0, 2.0]), np.float32([1.0, 2.0]))
    0.0
    """
    norm = float(np.linalg.norm(reference.astype(np.float64)))
    gap = float(np.linalg.norm(value.astype(np.float64) - reference.astype(np.float64)))
    return gap / norm if norm else (0.0 if gap == 0 else float("inf"))


class Range:
    """Smallest and largest value seen so far; batches are added one by one and not kept."""

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")

    def add(self, x: Floats) -> None:
        """Take a batch in.

        Raises:
            Refused: a value is NaN or infinite.
        """
        if x.size == 0:
            return
        low, high = float(x.min()), float(x.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = int(x.size - np.isfinite(x).sum())
            raise Refused("activations are finite", value=f"{bad} NaN or infinite values",
                          place="calibration",
                          fix="check the calibration data and the model's weights")  # fmt: skip
        self.low, self.high = min(self.low, low), max(self.high, high)


class Histogram:
    """Counts of values in equal bins over a known range; memory does not grow with the data."""

    def __init__(self, low: float, high: float, bins: int = BINS) -> None:
        self.low, self.high = float(low), float(high)
        self.counts = np.zeros(bins, np.int64)

    def add(self, x: Floats) -> None:
        """Take a batch in; values outside the range count in the outermost bins."""
        bins = self.counts.size
        width = (self.high - self.low) or 1.0
        index = ((x.ravel() - np.float32(self.low)) * np.float32(bins / width)).astype(np.int32)
        self.counts += np.bincount(np.clip(index, 0, bins - 1), minlength=bins)

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middle of every bin."""
        width = (self.high - self.low) / self.counts.size
        return np.asarray(self.low + width * (np.arange(self.counts.size) + 0.5), np.float64)


def percentile_range(histogram: Histogram, percentile: float = 99.99) -> tuple[float, float]:
    """Return the range that cuts (100 - percentile)% of the values off, half at each end.

    An end that lies at 0 (after a ReLU) stays there. Wu et al. 2020, "Integer quantization for deep
    learning inference", recommend 99.99% and above for activations.
    """
    share = np.cumsum(histogram.counts) / max(int(histogram.counts.sum()), 1)
    tail = (1 - percentile / 100) / 2
    width = (histogram.high - histogram.low) / histogram.counts.size
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    low = histogram.low if histogram.low >= 0 else histogram.low + width * first
    high = histogram.high if histogram.high <= 0 else histogram.low + width * (last + 1)
    return low, min(high, histogram.high)


def mse_range(histogram: Histogram, candidates: int = 80) -> tuple[float, float]:
    """Return the range, shrunk from the full one, with the least mean squared error of rounding.

    The search over shrunk ranges is that of Nagel et al. 2021, "A White Paper on Neural Network
    Quantization", section 3.1; the error is estimated from the histogram.
    """
    centers = histogram.centers.astype(np.float32)
    best = (np.inf, histogram.low, histogram.high)
    for share in np.linspace(1.0, 0.2, candidates):
        low, high = histogram.low * share, histogram.high * share
        grid = grid_of_range(min(low, high), max(low, high))
        gap = (dequantize(quantize(centers, grid), grid) - centers).astype(np.float64)
        error = float((gap * gap) @ histogram.counts)
        if error < best[0]:
            best = (error, low, high)
    return best[1], best[2]


class ChannelMean:
    """Mean of every channel (one axis) over batches of examples and all other axes, in float64."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.total: NDArray[np.float64] | None = None
        self.count = 0

    def add(self, x: Floats) -> None:
        """Take a batch in."""
        axis = self.axis % x.ndim
        total = x.sum(axis=tuple(i for i in range(x.ndim) if i != axis), dtype=np.float64)
        self.total = total if self.total is None else self.total + total
        self.count += x.size // x.shape[axis]

    @property
    def mean(self) -> NDArray[np.float64]:
        """The means, one for every channel."""
        assert self.total is not None
        return self.total / self.count


def bias_correction(
    expected: NDArray[np.float64], observed: NDArray[np.float64], scales: Floats | None = None
) -> Floats:
    """Return what to add to a bias `[out]` so that the mean output of every channel is as expected.

    Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section
    4.2 (its empirical form); Banner et al. 2019 correct the weights to the same end. With `scales`, the
    steps of an int32 bias, the correction is rounded to whole steps.
    """
    delta = expected - observed
    if scales is not None:
        delta = np.rint(delta / scales) * scales
    return delta.astype(np.float32)
