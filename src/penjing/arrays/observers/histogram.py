"""Histograms whose range grows with the data, without keeping the data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.observers.extremes import ends_of, refuse_other_shape, rows_of
from penjing.core.errors import Refused
from penjing.core.number_format import NumberFormat

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

BINS = 2048
LARGEST = 2**26
"""Bins of all rows together, at 8 bytes each."""

_CHUNK = 2**20
_SMALLEST_EXPONENT = -149


class Histogram:
    """Counts of the values under each scale, in bins as wide as a power of two that begin at its multiples.

    When a batch goes beyond the range, neighbouring bins are merged until it fits. A bin of twice the width
    is exactly two old ones, so the result does not depend on how the data are cut into batches or on their
    order. 0 is always an edge. At least half of the bins lie in the range, unless that would be finer than
    float32.

    Attributes:
        shape: of the scales; None before the first batch.
        low, high: extremes, float64 `[scales]`.
        exponent, first: of each row: its bins are `2**exponent` wide, and the first one begins at
            `first * 2**exponent`; `[scales]`.
        counts: `[scales, bins]`.
        zeros: how many values are exactly 0, `[scales]`; they count in the bins too.
    """

    def __init__(self, format: NumberFormat, axis: int = 0, bins: int = BINS) -> None:
        """Begin with nothing.

        Args:
            format: says which values share a scale.
            axis: where channels are, for granularity channel.
            bins: for each scale, at least 2.
        """
        if bins < 2:
            raise Refused(
                "a histogram must have at least 2 bins",
                value=bins,
                place="observer",
                fix="2048 bins are usual",
            )
        self._format, self._axis, self.bins = format, axis, bins
        self.shape: tuple[int, ...] | None = None
        self.low: Any = None
        self.high: Any = None

    def add(self, x: NDArray[Any]) -> None:
        """Take a batch in; one without values changes nothing.

        Raises:
            Refused: a value is NaN or infinite, the scales' shape differs from that of earlier batches, or
                there are so many scales that their bins do not fit into memory (`LARGEST`).
        """
        if x.size == 0:
            return
        rows, shape = rows_of(x, self._format, self._axis)
        low, high = ends_of(rows)
        if self.shape is None:
            self._begin(shape, low, high)
        else:
            refuse_other_shape(shape, self.shape, self._format)
            self._widen(np.minimum(self.low, low), np.maximum(self.high, high))
        self.zeros += np.count_nonzero(rows == 0, axis=1)
        step = max(1, _CHUNK // len(rows))
        for start in range(0, rows.shape[1], step):
            self._count(rows[:, start : start + step])

    def _begin(self, shape: tuple[int, ...], low: Floats, high: Floats) -> None:
        if len(low) * self.bins > LARGEST:
            raise Refused(
                "the histograms must fit into memory",
                value=f"{len(low)} scales of {self.bins} bins",
                place=str(self._format),
                fix="use fewer bins, or the observer minmax",
            )
        self.shape, self.low, self.high = shape, low, high
        self.exponent = _exponents(low, high, self.bins)
        self.first = _places(low, self.exponent)
        self.counts: Counts = np.zeros((len(low), self.bins), np.int64)
        self.zeros: Counts = np.zeros(len(low), np.int64)

    def _widen(self, low: Floats, high: Floats) -> None:
        exponent = _exponents(low, high, self.bins)
        first = _places(low, exponent)
        if not (np.array_equal(exponent, self.exponent) and np.array_equal(first, self.first)):
            shift = np.minimum(exponent - self.exponent, 63)[:, None]
            places = ((self.first[:, None] + np.arange(self.bins)) >> shift) - first[:, None]
            filled = self.counts > 0
            fresh = np.zeros_like(self.counts)
            np.add.at(fresh, (np.nonzero(filled)[0], places[filled]), self.counts[filled])
            self.counts = fresh
        self.low, self.high, self.exponent, self.first = low, high, exponent, first

    def _count(self, rows: NDArray[np.float32]) -> None:
        places = rows.astype(np.float64)
        places *= np.ldexp(1.0, -self.exponent)[:, None]
        np.floor(places, out=places)
        places += (np.arange(len(rows)) * self.bins - self.first)[:, None]
        flat = places.reshape(-1)
        if self._format.granularity == "group":
            flat = flat[~np.isnan(flat)]
        counted = np.bincount(flat.astype(np.int64), minlength=self.counts.size)
        self.counts += counted.reshape(self.counts.shape)

    @property
    def edges(self) -> Floats:
        """Ends of the bins, `[scales, bins + 1]`."""
        return np.ldexp(self.first[:, None] + np.arange(self.bins + 1.0), self.exponent[:, None])

    @property
    def centers(self) -> Floats:
        """What stands for the values of each bin, its middle within the extremes: `[scales, bins]`."""
        middles = (self.edges[:, 1:] + self.edges[:, :-1]) / 2
        return np.clip(middles, self.low[:, None], self.high[:, None])


def _exponents(low: Floats, high: Floats, bins: int) -> Counts:
    """Return the smallest exponents of a bin's width with which the bins cover [low, high]."""
    span, magnitude = high - low, np.maximum(np.abs(low), np.abs(high))
    by_span = np.where(span > 0, np.frexp(span / bins)[1] - 1, _SMALLEST_EXPONENT)
    by_magnitude = np.where(magnitude > 0, np.frexp(magnitude)[1] - 24, _SMALLEST_EXPONENT)
    exponent = np.maximum(np.maximum(by_span, by_magnitude), _SMALLEST_EXPONENT).astype(np.int64)
    while True:
        short = _places(high, exponent) - _places(low, exponent) >= bins
        if not short.any():
            return exponent
        exponent = exponent + short


def _places(x: Floats, exponent: Counts) -> Counts:
    """Return the number of the bin that each value is in, counted from 0 on the axis of numbers."""
    places: Counts = np.floor(np.ldexp(x, -exponent)).astype(np.int64)
    return places
