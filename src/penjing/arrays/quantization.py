"""The 8-bit integers of ONNX's fast kernels, as cases of `formats`; int32 biases; bias correction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.formats.coding import Encoded, decode, encode
from penjing.arrays.formats.parameters import parameters_of_range
from penjing.core.number_format import number_format

Floats = NDArray[np.float32]

ACTIVATIONS = number_format("uint8")
WEIGHTS = number_format("int8 narrow channel")
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
    """Return the asymmetric unsigned grid that covers [low, high] and has 0 on it (`parameters_of_range`).

    A range of no width at 0 gives the grid of step 1.

    Raises:
        Refused: the range is not finite or is reversed.

    >>> grid_of_range(0.0, 2.55).zero_point
    0
    """
    found = parameters_of_range(float(low), float(high), ACTIVATIONS)
    assert found.zero_points is not None
    return Grid(np.float32(found.scales), int(found.zero_points))


def quantize(x: Floats, grid: Grid) -> NDArray[np.uint8]:
    """Round to the nearest integer of the grid, half to even, saturating at 0 and 255, as infinity does.

    Raises:
        Refused: a value is NaN.
    """
    largest = np.finfo(np.float32).max
    finite = np.clip(np.asarray(x, np.float32), -largest, largest)
    integers: NDArray[np.uint8] = encode(finite, ACTIVATIONS, *_parameters(grid)).codes
    return integers


def _parameters(grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    return np.asarray(grid.scale, np.float32), np.asarray(grid.zero_point, np.uint8)


def weight_scales(weight: Floats, floor: Floats | None = None) -> Floats:
    """Return the step of every output channel of a weight `[out, ...]` for integers from -127 to 127.

    Args:
        weight: any shape, output channels first.
        floor: smallest step allowed for each channel, for a bias that must fit int32.

    Per-channel symmetric scales are Krishnamoorthi 2018 ("Quantizing deep convolutional networks for
    efficient inference"). A channel of zeros has step 1.

    Raises:
        Refused: a weight is NaN or infinite.
    """
    largest = np.abs(weight.reshape(weight.shape[0], -1)).max(axis=1, initial=0.0).astype(np.float64)
    if floor is not None:
        largest = np.maximum(largest, floor.astype(np.float64) * WEIGHTS.highest)
    scales: Floats = parameters_of_range(-largest, largest, WEIGHTS).scales
    return scales


def quantize_weight(weight: Floats, scales: Floats) -> NDArray[np.int8]:
    """Round a weight `[out, ...]` to -127..127 with one step for every output channel.

    Raises:
        Refused: a weight is NaN or infinite.
    """
    integers: NDArray[np.int8] = encode(weight, WEIGHTS, scales).codes
    return integers


def dequantize_weight(q: NDArray[np.int8], scales: Floats) -> Floats:
    """Return the real values of an integer weight `[out, ...]`, float32."""
    real: Floats = decode(Encoded(q, scales, None, WEIGHTS))
    return real


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
