"""First-order change of the loss, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores.units import Floats, Tensors, over_parameters
from penjing.core.backend import Group, Slot


def taylor_score(
    groups: Iterable[Group], tensors: Tensors, gradients: Iterable[Tensors]
) -> dict[str, Floats]:
    """Return for each group the mean over batches of `(sum of w dL/dw)^2`, summed over each unit.

    The first-order estimate of how the loss changes without the unit (Molchanov et al. 2019, eq. 8), summed
    over coupled members before squaring (group Fisher, Liu et al. 2021).

    Args:
        groups: the units.
        tensors: weights by layer and name.
        gradients: for each batch, gradients of the mean loss by layer and name; walked once.

    Returns:
        By group name, shape `[group.size]`, at least 0; zeros where there was no batch.
    """
    groups, batches = tuple(groups), 0
    total = {group.name: np.zeros(group.size) for group in groups}
    for gradient in gradients:
        batches += 1
        for group in groups:
            total[group.name] += np.square(first_order(group, tensors, gradient))
    return {name: score / max(batches, 1) for name, score in total.items()}


def first_order(group: Group, tensors: Tensors, gradient: Tensors) -> Floats:
    """Return for each unit the sum of weight times gradient over all members, shape `[group.size]`."""

    def product(slot: Slot) -> NDArray[np.floating]:
        weight = np.asarray(tensors[slot.layer][slot.tensor], np.float64)
        found = gradient.get(slot.layer, {}).get(slot.tensor)
        return np.zeros_like(weight) if found is None else weight * found

    return over_parameters(group, product)
