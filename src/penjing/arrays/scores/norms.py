"""How large a unit's parameters are, or how far from those of others: weights alone."""

from __future__ import annotations

import numpy as np

from penjing.arrays.scores.units import Floats, Tensors, over_parameters, parameters, rows_by_unit
from penjing.core.backend import Group


def l1_score(group: Group, tensors: Tensors) -> Floats:
    """Return `sum |w|` over all parameters of each unit, in every member of the group.

    (Li et al. 2017, "Pruning Filters for Efficient ConvNets", for one filter; summed over coupled layers as
    in Fang et al. 2023, DepGraph.) Needs weights only.

    Returns:
        Shape `[group.size]`, at least 0.
    """
    return over_parameters(group, lambda slot: np.abs(tensors[slot.layer][slot.tensor]))


def l2_score(group: Group, tensors: Tensors) -> Floats:
    """Return `sqrt(sum w^2)` over all parameters of each unit, in every member of the group.

    (Li et al. 2017 for one filter; summed over coupled layers as in Fang et al. 2023, DepGraph.) Needs
    weights only.

    Returns:
        Shape `[group.size]`, at least 0.
    """
    return np.sqrt(
        over_parameters(group, lambda slot: np.square(np.asarray(tensors[slot.layer][slot.tensor], float)))
    )


def lamp_score(group: Group, tensors: Tensors) -> Floats:
    """Return `w_u^2 / sum of w_v^2 over units v with w_v >= w_u`, where `w` is the norm of a unit.

    (Lee et al. 2021, "Layer-Adaptive Sparsity for the Magnitude-based Pruning", there for single weights of
    a layer; here for units of a group.) The scores of different groups compare: the largest of each is 1.
    Needs weights only. Of equal units, each later one counts as larger.

    Returns:
        Shape `[group.size]`, in [0, 1]; 0 for units of zeros.
    """
    return lamp(np.square(l2_score(group, tensors)))


def lamp(squares: Floats) -> Floats:
    """Return each value's share of the sum of all values that are not smaller.

    >>> lamp(np.array([1.0, 4.0, 3.0])).round(3).tolist()
    [0.125, 1.0, 0.429]
    """
    rising = np.argsort(squares, kind="stable")
    rest = np.cumsum(squares[rising][::-1])[::-1]
    result = np.zeros(len(squares))
    result[rising] = np.divide(squares[rising], rest, out=np.zeros(len(rest)), where=rest > 0)
    return result


def fpgm_score(group: Group, tensors: Tensors) -> Floats:
    """Return for each unit the sum of distances `||w_u - w_v||_2` to all other units of its group.

    Units near the geometric median are those that the others can replace (He et al. 2019, "Filter Pruning
    via Geometric Median", eq. 6 and 8); a unit is all its parameters in every member of the group. Needs
    weights only, and memory for `[size, size]` numbers.

    Returns:
        Shape `[group.size]`, at least 0.
    """
    squared = np.zeros((group.size, group.size))
    for slot in parameters(group):
        squared += _squared_distances(rows_by_unit(tensors[slot.layer][slot.tensor], slot, group.size))
    return np.asarray(np.sqrt(squared).sum(axis=1))


def _squared_distances(rows: Floats) -> Floats:
    # Moving the origin to the mean keeps the differences and saves digits.
    rows = rows - rows.mean(axis=0)
    products = rows @ rows.T
    norms = np.diag(products)
    distances = np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0)
    np.fill_diagonal(distances, 0)
    return np.asarray(distances)
