"""Second-order change of the loss by gates on units: the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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

    def squared(group: Group, batch: GateGradients) -> Floats:
        sums = sum(to_units(batch.sums[s.layer], s, group.size) for s in consumers(group))
        return np.asarray(np.square(sums).sum(axis=0))

    return _mean_over_examples(groups, gates, squared)


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

    def squared(group: Group, batch: GateGradients) -> Floats:
        totals = (to_units(batch.squares[s.layer].sum(axis=0), s, group.size) for s in consumers(group))
        return np.asarray(sum(totals)) / 2

    return _mean_over_examples(groups, gates, squared)


def _mean_over_examples(
    groups: Sequence[Group],
    gates: Iterable[GateGradients],
    of_batch: Callable[[Group, GateGradients], Floats],
) -> dict[str, Floats]:
    """Return by group the mean over examples of what `of_batch` sums over those of a batch."""
    total = {group.name: np.zeros(group.size) for group in groups}
    examples, missing = 0, set()
    for batch in gates:
        examples += batch.examples
        for group in groups:
            slots = consumers(group)
            if slots and all(len(s.units) == batch.width(s.layer) for s in slots):
                total[group.name] += of_batch(group, batch)
            else:
                missing.add(group.name)
    return {name: score / max(examples, 1) for name, score in total.items() if name not in missing}
