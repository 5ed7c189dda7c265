"""Scale of the batch normalization."""

from __future__ import annotations

import numpy as np

from penjing.arrays.scores.units import Floats, Tensors, sum_by_unit
from penjing.core.backend import Group


def batchnorm_score(group: Group, tensors: Tensors) -> Floats | None:
    """Return `|gamma|` of each channel, summed over the BatchNorm layers of the group.

    (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".) Needs weights
    only. A BatchNorm is a layer with running statistics and a weight.

    Returns:
        Shape `[group.size]`, at least 0; None where some unit passes through no BatchNorm with a scale.
    """
    total, seen = np.zeros(group.size), np.zeros(group.size, bool)
    for slot in group.slots:
        if slot.tensor == "weight" and "running_var" in tensors[slot.layer]:
            total += sum_by_unit(np.abs(tensors[slot.layer]["weight"]), slot, group.size)
            seen[slot.units[slot.units >= 0]] = True
    return total if seen.all() else None
