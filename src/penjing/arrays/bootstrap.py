"""The paired bootstrap: bounds for any statistic of a sample, with bias and skewness corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Takes `[rows, n]` example weights (how often each example was drawn), returns `[rows]` values."""

REPLICATES = 2000
JACKKNIFE_GROUPS = 200
_CELLS = 4_000_000
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Resampled:
    """A statistic with its bootstrap distribution.

    Attributes:
        value: on the sample itself.
        replicates: sorted values on the resamples.
        bias, acceleration: the two constants of the BCa method.
    """

    value: float
    replicates: Floats
    bias: float
    acceleration: float

    def quantile(self, share: float) -> float:
        """Return the one-sided BCa bound: above it with probability `share`.

        Source: Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987).
        """
        z = self.bias + _NORMAL.inv_cdf(share)
        moved = _NORMAL.cdf(self.bias + z / max(1 - self.acceleration * z, 1e-3))
        return float(np.quantile(self.replicates, moved))

    @property
    def deviation(self) -> float:
        """Return the standard error."""
        return float(self.replicates.std())


def bootstrap(statistic: Statistic, n: int, replicates: int = REPLICATES, seed: int = 0) -> Resampled:
    """Draw n examples with replacement again and again, and take the statistic of each draw.

    Resamples on which the statistic is not defined (NaN) are left out.

    Args:
        statistic: of example weights.
        n: number of examples, at least 2.
        replicates: number of resamples.
        seed: of the draws.

    Raises:
        Refused: fewer than 2 examples, or undefined on the sample or on more than a twentieth of the draws.
    """
    if n < 2:
        raise Refused("needs at least 2 examples", value=n, place="bootstrap", fix="use a larger test split")
    rng = np.random.default_rng(seed)
    value = float(statistic(np.ones((1, n)))[0])
    rows = max(1, _CELLS // n)
    parts = [statistic(_draw(rng, min(rows, replicates - start), n)) for start in range(0, replicates, rows)]
    drawn = np.concatenate(parts)
    drawn = np.sort(drawn[~np.isnan(drawn)])
    if np.isnan(value) or len(drawn) < 0.95 * replicates:
        raise Refused(
            "the metric must be defined on resamples of the data",
            value=f"undefined on {replicates - len(drawn)} of {replicates}",
            place="bootstrap",
            fix="use a larger test split, or a metric that needs no rare class",
        )
    return Resampled(value, drawn, _bias(drawn, value), _acceleration(statistic, n, rng))


def _draw(rng: np.random.Generator, rows: int, n: int) -> Floats:
    picks = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def _bias(drawn: Floats, value: float) -> float:
    below = np.count_nonzero(drawn < value - 1e-12) + np.count_nonzero(np.abs(drawn - value) <= 1e-12) / 2
    return _NORMAL.inv_cdf(min(max(below, 0.5), len(drawn) - 0.5) / len(drawn))


def _acceleration(statistic: Statistic, n: int, rng: np.random.Generator) -> float:
    """Return the skewness of the statistic's influence, from leaving out groups of examples."""
    groups = min(n, JACKKNIFE_GROUPS)
    member = rng.permutation(n) % groups
    rows = max(1, _CELLS // n)
    left_out = np.concatenate(
        [
            statistic((member != np.arange(start, min(start + rows, groups))[:, None]).astype(float))
            for start in range(0, groups, rows)
        ]
    )
    spread = np.nanmean(left_out) - left_out
    spread = spread[~np.isnan(spread)]
    scale = float((spread**2).sum()) ** 1.5
    return float((spread**3).sum() / (6 * scale)) if scale > 0 else 0.0
