"""Distance from the geometric median."""

from __future__ import annotations

import numpy as np

from penjing.arrays.scores.units import Floats, Tensors, parameters, rows_by_unit
from penjing.core.backend import Group


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
