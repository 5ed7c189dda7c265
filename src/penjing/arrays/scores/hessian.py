"""Optimal brain damage: curvature times squared weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores.units import Floats, Tensors, over_parameters
from penjing.core.backend import Group, Slot


def hessian_score(
    groups: Sequence[Group], tensors: Tensors, diagonals: Iterable[Tensors]
) -> dict[str, Floats]:
    """Return `1/2 sum of h w^2` over all parameters of each unit, `h` the diagonal of the loss's Hessian.

    (LeCun, Denker and Solla 1990, "Optimal Brain Damage"; the diagonal by Hutchinson's estimator, as in
    Yao et al. 2021, "AdaHessian".)

    Args:
        groups: the units.
        tensors: weights by layer and name.
        diagonals: for each batch, an unbiased estimate of the diagonal by layer and name; walked once.

    Returns:
        By group name, shape `[group.size]`; below 0 where the estimate or the curvature is.
    """
    total = {group.name: np.zeros(group.size) for group in groups}
    batches = 0
    for diagonal in diagonals:
        batches += 1
        for group in groups:
            total[group.name] += _damage(group, tensors, diagonal)
    return {name: score / max(batches, 1) for name, score in total.items()}


def _damage(group: Group, tensors: Tensors, diagonal: Tensors) -> Floats:
    def product(slot: Slot) -> NDArray[np.floating]:
        weight = np.asarray(tensors[slot.layer][slot.tensor], np.float64)
        found = diagonal.get(slot.layer, {}).get(slot.tensor)
        return np.zeros_like(weight) if found is None else np.square(weight) * found / 2

    return over_parameters(group, product)
