"""Diagonal empirical Fisher information of a gate on each unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from penjing.arrays.scores.units import Floats, consumers, to_units
from penjing.core.backend import GateGradients, Group


def fisher_score(groups: Sequence[Group], gates: Iterable[GateGradients]) -> dict[str, Floats]:
    """Return for each unit the mean over examples of `(dL/dm)^2`, `m` a gate of value 1 on its output.

    The diagonal of the empirical Fisher information (Theis et al. 2018, "Faster gaze prediction with dense
    networks and Fisher pruning"; Kwon et al. 2022 for heads and neurons). The gate's derivative in one
    example is the sum of `x dL/dx` over all positions and all layers that take the unit as input.

    Args:
        groups: the units.
        gates: batch by batch, what `GradientBackend.gate_gradients` yields; walked once.

    Returns:
        By group name, shape `[group.size]`, at least 0; without groups that have no consumer or of
        which one is missing.
    """
    total = {group.name: np.zeros(group.size) for group in groups}
    examples, missing = 0, set()
    for batch in gates:
        examples += batch.examples
        for group in groups:
            slots = consumers(group)
            if not slots or any(len(s.units) != batch.width(s.layer) for s in slots):
                missing.add(group.name)
                continue
            derivative = sum(to_units(batch.sums[s.layer], s, group.size) for s in slots)
            total[group.name] += np.square(derivative).sum(axis=0)
    return {name: score / max(examples, 1) for name, score in total.items() if name not in missing}
