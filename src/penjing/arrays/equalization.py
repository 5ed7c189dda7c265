"""Cross-layer equalization: ranges of channels made alike on both sides of a layer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Factors = NDArray[np.float64]

TOLERANCE = 1e-3
"""Largest change of a factor, relative, at which ranges count as settled."""


@dataclass(frozen=True)
class Pair:
    """A layer whose output channels can be divided by factors that the layers behind it multiply.

    Attributes:
        producer: name of the layer.
        consumers: names of the layers that take its output, at least one.
    """

    producer: str
    consumers: tuple[str, ...]


def equalizing_factors(
    pairs: Sequence[Pair], weights: Mapping[str, NDArray[Any]], groups: Mapping[str, int], sweeps: int = 100
) -> dict[str, Factors]:
    """Return by producer what its output channels are divided by, so that ranges meet.

    A channel's range r₁ in the weight that makes it, and r₂ in the weights that take it, become √(r₁ r₂)
    both, by s = √(r₁ r₂) / r₂; pair after pair, since a layer is in two of them, until no factor changes by
    more than `TOLERANCE`. Nagel et al. 2019, "Data-free quantization through weight equalization and bias
    correction", section 4.1.

    Args:
        pairs: in the order of the data.
        weights: by layer, `[out, in / groups, *kernel]`.
        groups: of each layer, at least 1.
        sweeps: over all pairs, at most.

    Returns:
        Factors `[out]` above 0; 1 for a channel whose range is 0 on either side.

    >>> weights = {"a": np.array([[4.0], [1.0]]), "b": np.array([[1.0, 1.0]])}
    >>> equalizing_factors([Pair("a", ("b",))], weights, {"a": 1, "b": 1})["a"]
    array([2., 1.])
    """
    sizes = {name: _magnitudes(weight) for name, weight in weights.items()}
    found = {pair.producer: np.ones(len(weights[pair.producer])) for pair in pairs}
    for _ in range(sweeps):
        largest = 0.0
        for pair in pairs:
            made = sizes[pair.producer].max(axis=1, initial=0.0)
            taken = np.max([input_ranges(sizes[name], groups[name]) for name in pair.consumers], axis=0)
            step = np.ones(len(made))
            live = (made > 0) & (taken > 0)
            step[live] = np.sqrt(made[live] / taken[live])
            sizes[pair.producer] = sizes[pair.producer] / step[:, None]
            for name in pair.consumers:
                sizes[name] = scaled_inputs(sizes[name], step, groups[name])
            found[pair.producer] *= step
            largest = max(largest, float(np.abs(np.log(step)).max(initial=0.0)))
        if largest <= TOLERANCE:
            break
    return found


def input_ranges(weight: NDArray[Any], groups: int) -> Factors:
    """Return the largest magnitude of each input channel, `[in]`.

    Args:
        weight: `[out, in / groups, *kernel]`.
        groups: at least 1.
    """
    sizes = _magnitudes(weight)
    parts = sizes.reshape(groups, -1, sizes.shape[1])
    ranges: Factors = parts.max(axis=1, initial=0.0).reshape(-1)
    return ranges


def scaled_inputs(weight: NDArray[Any], factors: Factors, groups: int) -> NDArray[Any]:
    """Return a weight `[out, in / groups, *kernel]` whose input channels are multiplied by factors `[in]`."""
    own = np.repeat(factors.reshape(groups, -1), len(weight) // groups, axis=0)
    scaled: NDArray[Any] = weight * own.reshape(*own.shape, *[1] * (weight.ndim - 2))
    return scaled


def precision(weight: NDArray[Any]) -> float:
    """Return the mean of the channels' ranges over the range of the whole, in [0, 1]; 1 where all are alike.

    What share of one common grid the channels of a weight `[out, ...]` use (the paper's equation 8).
    """
    ranges = _magnitudes(weight).max(axis=1, initial=0.0)
    largest = float(ranges.max(initial=0.0))
    return float(ranges.mean()) / largest if largest else 1.0


def _magnitudes(weight: NDArray[Any]) -> Factors:
    """Return the largest magnitude over the kernel, `[out, in / groups]`."""
    found: Factors = np.abs(weight.astype(np.float64)).reshape(*weight.shape[:2], -1).max(axis=2, initial=0.0)
    return found
