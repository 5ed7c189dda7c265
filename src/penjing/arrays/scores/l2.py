"""Euclidean norm of the weights."""

from __future__ import annotations

import numpy as np

from penjing.arrays.scores.units import Floats, Tensors, over_parameters
from penjing.core.backend import Group


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
