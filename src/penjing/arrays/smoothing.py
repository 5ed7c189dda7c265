"""Moving the spread of activations into weights, so that both round well to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.formats.coding import rounded
from penjing.arrays.formats.parameters import parameters_of
from penjing.arrays.quantization import ACTIVATIONS, WEIGHTS

Floats = NDArray[np.float32]

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Smoothing:
    """What a tensor is divided by, channel by channel, and the weights that take it are multiplied by.

    Attributes:
        factors: float32 `[channels]`, above 0, geometric mean 1.
        strength: the exponent that gave them, 0 for none (all factors are 1).
        before, after: squared error of the products over their squares, rounded as they are and smoothed.
    """

    factors: Floats
    strength: float
    before: float
    after: float


def smoothing_factors(largest: Floats, weights: Sequence[Floats], strength: float) -> Floats:
    """Return `max |x_j|^strength / max |w_j|^(1 - strength)`, scaled to a geometric mean of 1.

    Xiao et al. 2023, "SmoothQuant", equation 4. A channel that is 0 on either side keeps the factor 1.

    Args:
        largest: magnitude of each channel of the activation, `[channels]`.
        weights: of all layers that take it, each `[out, channels]`.
        strength: from 0 (everything stays with the activation) to 1 (all spread goes into the weights).
    """
    widest = np.max([np.abs(w).max(axis=0) for w in weights], axis=0).astype(np.float64)
    x = largest.astype(np.float64)
    usable = (x > 0) & (widest > 0)
    logs = np.zeros(len(x))
    logs[usable] = strength * np.log(x[usable]) - (1 - strength) * np.log(widest[usable])
    if usable.any():
        logs[usable] -= logs[usable].mean()
    return np.exp(np.clip(logs, -10, 10)).astype(np.float32)


def smoothing(x: Floats, largest: Floats, weights: Sequence[Floats], gain: float = 0.1) -> Smoothing:
    """Return the factors whose rounded products err least; none where the best gains too little.

    Every strength in `STRENGTHS` is tried on real rows: activations rounded to unsigned 8 bits on one grid
    over their range, weights to signed 8 bits for each channel.

    Args:
        x: rows of the activation, `[rows, channels]`.
        largest: magnitude of each channel, over more rows than these.
        weights: of all layers that take it, each `[out, channels]`.
        gain: share of the squared error that smoothing has to take away.
    """
    wanted = [x @ w.T for w in weights]
    whole = max(sum(float(np.square(y, dtype=np.float64).sum()) for y in wanted), 1e-30)

    def error(factors: Floats) -> float:
        seen = np.clip(x / factors, -largest / factors, largest / factors)
        narrow = rounded(seen, ACTIVATIONS, *parameters_of(seen, ACTIVATIONS))
        off = 0.0
        for w, y in zip(weights, wanted, strict=True):
            scaled = w * factors
            off += float(np.square(narrow @ rounded(scaled, WEIGHTS).T - y, dtype=np.float64).sum())
        return off / whole

    none = np.ones(len(largest), np.float32)
    before = error(none)
    tried = {strength: smoothing_factors(largest, weights, strength) for strength in STRENGTHS}
    errors = {strength: error(factors) for strength, factors in tried.items()}
    best = min(errors, key=lambda strength: errors[strength])
    if errors[best] > (1 - gain) * before:
        return Smoothing(none, 0.0, before, before)
    return Smoothing(tried[best], best, before, errors[best])
