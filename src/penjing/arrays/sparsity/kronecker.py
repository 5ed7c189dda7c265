"""Which weights of a whole network go, by curves of each row's error and what that error costs at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.sparsity.allocation import allocate
from penjing.arrays.sparsity.obc import Removals
from penjing.arrays.sparsity.patterns import Pattern


def network_masks(
    found: Mapping[str, Sequence[Removals]],
    slopes: Mapping[str, NDArray[np.float64]],
    sparsity: float,
    pattern: Pattern,
) -> dict[str, list[NDArray[np.bool_]]]:
    """Return the masks of least cost over all layers together.

    The curvature of a layer is taken as a Kronecker product of the second moments of its inputs, which
    `removals` works with, and of the slopes at its outputs, of which the diagonal is taken (Martens & Grosse
    2015, "Optimizing neural networks with Kronecker-factored approximate curvature"). So the cost of a row's
    error is this error times the row's slope, and rows of all layers compete (as in optimal brain surgeon on
    the whole network; Singh & Alistarh 2020, "WoodFisher", use blocks of the empirical Fisher instead).

    Args:
        found: by layer, one for each group of a convolution.
        slopes: by layer `[out]`, the mean over examples of the squared derivative of what counts by the
            output, summed over positions; rows in one block share the mean.
        sparsity: share of zeros in (0, 1) over all layers; every row (of blocks) keeps a block.
        pattern: that of `found`; N:M has its own sparsity.

    Returns:
        By layer and group `[rows, columns]`, True where kept.
    """
    parts = [(name, group, part) for name, groups in found.items() for group, part in enumerate(groups)]
    if pattern.group:
        counts = [np.full(part.order.shape[0], part.order.shape[1]) for _, _, part in parts]
    else:
        counts = _shared_out(parts, slopes, sparsity)
    masks: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in found}
    for (name, _, part), count in zip(parts, counts, strict=True):
        masks[name].append(part.mask(count, pattern))
    return masks


def _shared_out(
    parts: Sequence[tuple[str, int, Removals]], slopes: Mapping[str, NDArray[np.float64]], sparsity: float
) -> list[NDArray[np.int64]]:
    curves = []
    for name, group, part in parts:
        rows = len(part.order)
        each = slopes[name].reshape(-1, rows, slopes[name].size // (rows * _groups(parts, name)))[group]
        curves.append(part.errors[:, :-1] * each.mean(axis=1)[:, None])
    blocks = sum(part.order.size for _, _, part in parts)
    able = sum(curve.size - len(curve) for curve in curves)
    removed = min(round(sparsity * blocks), able)
    counts = allocate([row for curve in curves for row in curve], removed)
    return np.split(counts, np.cumsum([len(curve) for curve in curves])[:-1])


def _groups(parts: Sequence[tuple[str, int, Removals]], name: str) -> int:
    return sum(other == name for other, _, _ in parts)
