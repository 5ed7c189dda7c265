"""What is lost once the layers behind are refitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores.units import Floats, Tensors, consumers
from penjing.arrays.unit_surgeon import Consumer, scores
from penjing.core.backend import Group, KroneckerFactors, Slot


def refit_score(
    groups: Iterable[Group], tensors: Tensors, factors: Mapping[str, KroneckerFactors]
) -> dict[str, Floats | None]:
    """Return for each group what the loss gains by each unit's removal, once the layers behind are refitted.

    Units go one after the other, the cheapest first; the score of one is what it adds to the error of the
    layers that take it, these being refitted by least squares, weighed by the curvature of the loss (Kurtic
    et al. 2023, "ZipLM", for structures; the factors are those of Martens & Grosse 2015). A unit that others
    make up for is cheap, however large it is.

    Args:
        groups: the units.
        tensors: weights by layer and name.
        factors: of the consuming layers; a consumer without factors does not count.

    Returns:
        By group name, shape `[group.size]`, at least 0 and rising in the order of removal; None where no
        consumer has factors.
    """
    found: dict[str, Floats | None] = {}
    for group in groups:
        takers = [
            consumer_of(tensors[slot.layer]["weight"], slot, factors[slot.layer])
            for slot in consumers(group)
            if slot.layer in factors
        ]
        found[group.name] = scores(takers, group.blocks) if takers else None
    return found


def consumer_of(weight: NDArray[Any], slot: Slot, factors: KroneckerFactors) -> Consumer:
    """Return a consuming layer as a matrix, and the unit of each of its columns.

    Args:
        weight: the layer's, inputs along the slot's axis, kernels behind.
        slot: where the layer takes the units.
        factors: of the layer.
    """
    columns = np.moveaxis(np.asarray(weight, np.float64), slot.axis, 1)
    kernel = int(np.prod(columns.shape[2:]))
    return Consumer(columns.reshape(len(columns), -1), np.repeat(slot.units, kernel), factors)
