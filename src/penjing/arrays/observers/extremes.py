"""Smallest and largest values over batches, as they are or as a moving average."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.formats.layout import to_rows
from penjing.core.errors import Refused
from penjing.core.number_format import NumberFormat

Floats = NDArray[np.float64]


class Extremes:
    """The range of the values under each scale; batches are added one by one and not kept.

    Attributes:
        low, high: float64, of the scales' shape; None before the first batch.
    """

    def __init__(self, format: NumberFormat, axis: int = 0, momentum: float | None = None) -> None:
        """Begin with nothing.

        Args:
            format: says which values share a scale.
            axis: where channels are, for granularity channel.
            momentum: in [0, 1): weight of what was seen before, in an exponential moving average of each
                batch's extremes (Jacob et al. 2018, section 3.1) that begins with the first batch; None:
                the extremes of all batches.
        """
        if momentum is not None and not 0 <= momentum < 1:
            raise Refused(
                "the momentum must be at least 0 and below 1",
                value=momentum,
                place="observer",
                fix="choose for example 0.9",
            )
        self._format, self._axis, self._momentum = format, axis, momentum
        self.low: Any = None
        self.high: Any = None

    def add(self, x: NDArray[Any]) -> None:
        """Take a batch in; one without values changes nothing.

        Raises:
            Refused: a value is NaN or infinite, or the scales' shape differs from that of earlier batches.
        """
        if x.size == 0:
            return
        rows, shape = rows_of(x, self._format, self._axis)
        low, high = (ends.reshape(shape) for ends in ends_of(rows))
        if self.low is None:
            self.low, self.high = low, high
            return
        refuse_other_shape(shape, self.low.shape, self._format)
        if self._momentum is None:
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        else:
            self.low = self._momentum * self.low + (1 - self._momentum) * low
            self.high = self._momentum * self.high + (1 - self._momentum) * high


def rows_of(x: NDArray[Any], format: NumberFormat, axis: int) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    """Return values as float32 `[scales, values]` and the scales' shape; NaN fills up a shorter last group.

    Raises:
        Refused: a value is NaN or infinite, or the shape does not fit the granularity.
    """
    with np.errstate(over="ignore"):
        x = x.astype(np.float32, copy=False)
    refuse_not_finite(x)
    if format.granularity == "channel" and x.ndim:
        x = np.moveaxis(x, axis, 0)
    rows: NDArray[np.float32] = to_rows(x, format, np.nan)
    return rows, format.scale_shape(x.shape)


def ends_of(rows: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Return the smallest and the largest value of each row, float64; NaN does not count."""
    return np.fmin.reduce(rows, axis=1).astype(np.float64), np.fmax.reduce(rows, axis=1).astype(np.float64)


def refuse_not_finite(x: NDArray[Any]) -> None:
    """Refuse NaN and infinite values, counted."""
    # Extremes are finite only if all values are, and cost no array of marks.
    if x.size and not (np.isfinite(x.min()) and np.isfinite(x.max())):
        bad = int(x.size - np.isfinite(x).sum())
        raise Refused(
            "the activations must be finite",
            value=f"{bad} NaN or infinite values",
            place="calibration",
            fix="check the calibration data and the model's weights",
        )


def refuse_other_shape(shape: tuple[int, ...], before: tuple[int, ...], format: NumberFormat) -> None:
    """Refuse a batch whose scales have another shape than those of earlier batches."""
    if shape != before:
        raise Refused(
            "the scales of all batches must have one shape",
            value=f"{shape} after {before}",
            place=str(format),
            fix="observe per tensor or channel, or equal batches",
        )
