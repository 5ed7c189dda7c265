"""How the loss changes without a unit's parameters: its Taylor expansion, first and second order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

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
    return _mean_over_batches(
        groups, gradients, lambda group, gradient: np.square(first_order(group, tensors, gradient))
    )


def first_order(group: Group, tensors: Tensors, gradient: Tensors) -> Floats:
    """Return for each unit the sum of weight times gradient over all members, shape `[group.size]`."""
    return _product(group, tensors, gradient, lambda weight, slope: weight * slope)


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

    def damage(group: Group, diagonal: Tensors) -> Floats:
        return _product(group, tensors, diagonal, lambda weight, curve: np.square(weight) * curve / 2)

    return _mean_over_batches(groups, diagonals, damage)


def _mean_over_batches(
    groups: Iterable[Group], batches: Iterable[Tensors], of_batch: Callable[[Group, Tensors], Floats]
) -> dict[str, Floats]:
    groups, count = tuple(groups), 0
    total = {group.name: np.zeros(group.size) for group in groups}
    for batch in batches:
        count += 1
        for group in groups:
            total[group.name] += of_batch(group, batch)
    return {name: score / max(count, 1) for name, score in total.items()}


def _product(
    group: Group, tensors: Tensors, derivatives: Tensors, term: Callable[[Floats, Floats], Floats]
) -> Floats:
    """Sum a term of weight and derivative over all parameters of each unit; 0 where there is none."""

    def product(slot: Slot) -> Floats:
        weight = np.asarray(tensors[slot.layer][slot.tensor], np.float64)
        found = derivatives.get(slot.layer, {}).get(slot.tensor)
        return np.zeros_like(weight) if found is None else term(weight, np.asarray(found, np.float64))

    return over_parameters(group, product)
