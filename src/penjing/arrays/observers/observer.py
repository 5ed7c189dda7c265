"""Observers: what range the values of a tensor have, chosen in one of five ways, batch by batch."""

from __future__ import annotations

from typing import Any, Literal, get_args

from numpy.typing import NDArray

from penjing.arrays.formats.parameters import Parameters, parameters_of_range
from penjing.arrays.observers.choices import (
    Range,
    entropy_range,
    mse_range,
    percentile_range,
    refuse_few_bins,
    refuse_percentile,
)
from penjing.arrays.observers.extremes import Extremes
from penjing.arrays.observers.histogram import BINS, Histogram
from penjing.core.errors import Refused, nearest
from penjing.core.number_format import NumberFormat

ObserverKind = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]

ENTROPY_BINS = 8192
"""For each scale; what entropy can clip ends where there are fewer bins than codes."""


class Observer:
    """Takes batches of one tensor in and tells its range, in memory that does not grow with the data.

    `minmax` and `moving_average` take extremes (`Extremes`); `percentile`, `mse` and `entropy` choose from a
    histogram for each scale (`Histogram`). With granularity token or group every batch must give scales of
    one shape.
    """

    def __init__(
        self,
        kind: ObserverKind,
        format: NumberFormat,
        *,
        axis: int = 0,
        percentile: float = 99.99,
        momentum: float = 0.9,
    ) -> None:
        """Begin with nothing.

        Args:
            kind: how the range is chosen.
            format: that values will be rounded to; says which values share a scale.
            axis: where channels are, for granularity channel.
            percentile: in (50, 100], share of the values that is kept; for `percentile`.
            momentum: in [0, 1), weight of earlier batches; for `moving_average`.

        Raises:
            Refused: a setting out of its range, or more than 9 bits for `entropy`.
        """
        if kind not in get_args(ObserverKind):
            raise Refused(
                "must be the name of an observer",
                value=repr(kind),
                place="observer",
                fix=nearest(str(kind), get_args(ObserverKind)),
            )
        if kind == "percentile":
            refuse_percentile(percentile)
        if kind == "entropy":
            refuse_few_bins(ENTROPY_BINS, format)
        self.kind, self.format, self._percentile = kind, format, percentile
        self._seen: Extremes | Histogram
        if kind in ("minmax", "moving_average"):
            self._seen = Extremes(format, axis, momentum if kind == "moving_average" else None)
        else:
            self._seen = Histogram(format, axis, ENTROPY_BINS if kind == "entropy" else BINS)

    def add(self, x: NDArray[Any]) -> None:
        """Take a batch in.

        Raises:
            Refused: a value is NaN or infinite, or the shape does not fit.
        """
        self._seen.add(x)

    def range(self) -> Range:
        """Return the low and the high ends, float64 of the scales' shape.

        Raises:
            Refused: nothing was seen.
        """
        seen = self._seen
        if seen.low is None:
            raise Refused(
                "must have seen data",
                value="no values",
                place=f"observer {self.kind}",
                fix="give calibration data",
            )
        if isinstance(seen, Extremes):
            return seen.low, seen.high
        if self.kind == "percentile":
            return percentile_range(seen, self._percentile)
        return (mse_range if self.kind == "mse" else entropy_range)(seen, self.format)

    def parameters(self) -> Parameters:
        """Return scales and zero points for the range; errors as in `range` and `parameters_of_range`."""
        return parameters_of_range(*self.range(), self.format)
