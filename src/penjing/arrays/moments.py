"""Means and variances of channels, and the scale and shift that bring one pair to another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Moments = tuple[Floats, Floats]
"""Mean and variance of each channel, `[channels]` both."""


def match(now: Moments, wanted: Moments, shrinkage: float) -> tuple[Floats, Floats]:
    """Return for each channel the scale s and the shift t for which `s x + t` has the wanted moments.

    `s = sqrt((wanted + e) / (variance + e))` with `e = shrinkage · mean(wanted)`: a channel that hardly
    varies any more is not blown up by what little noise it has left. With `shrinkage = 0` and a variance
    above 0 the match is exact (Jordan et al. 2022, "REPAIR: renormalizing permuted activations for
    interpolation repair", section 3).

    Args:
        now: of the channels as they are.
        wanted: of the same channels in the original.
        shrinkage: at least 0.

    >>> one = np.ones(1)
    >>> scale, shift = match((one, 4 * one), (2 * one, 9 * one), shrinkage=0.0)
    >>> scale.tolist(), shift.tolist()
    ([1.5], [0.5])
    """
    (mean, variance), (wanted_mean, wanted_variance) = now, wanted
    slack = shrinkage * float(wanted_variance.mean()) if wanted_variance.size else 0.0
    below = variance + slack
    scale = np.sqrt(np.divide(wanted_variance + slack, below, out=np.ones_like(below), where=below > 0))
    return scale, wanted_mean - scale * mean
