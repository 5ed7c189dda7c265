"""Second-order change of the loss when the elements of a unit's output go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from penjing.arrays.scores.units import Floats, consumers, to_units
from penjing.core.backend import GateGradients, Group


def output_fisher_score(groups: Sequence[Group], gates: Iterable[GateGradients]) -> dict[str, Floats]:
    """Return for each unit `1/2 E[sum of (dL/dy dy)^2]` over the elements of its output, where `dy = -y`.

    The loss to second order with the diagonal Fisher information of the output's elements as curvature
    (the sensitivity of FIT, Zandonati et al. 2022, for removal instead of rounding). Unlike `fisher`,
    elements cannot cancel.

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
            for s in slots:
                total[group.name] += to_units(batch.squares[s.layer].sum(axis=0), s, group.size) / 2
    return {name: score / max(examples, 1) for name, score in total.items() if name not in missing}
