"""Layer-adaptive magnitude."""

from __future__ import annotations

import numpy as np

from penjing.arrays.scores.l2 import l2_score
from penjing.arrays.scores.units import Floats, Tensors
from penjing.core.backend import Group


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
