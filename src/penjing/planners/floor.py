"""The smallest model that the first planner can make: a probe of what a budget could reach."""

from __future__ import annotations

from penjing.core.plan import Plan, chain
from penjing.prune.channels import PruneChannels
from penjing.repair.bias import CorrectBias

FLOOR_RATIO = 0.875
"""Channels removed by the probe; past this little is left of any network."""


def plan_smallest_model(precisions: tuple[Plan, ...], prunable: bool) -> Plan | None:
    """Return the plan of the probe, untrained, or None where no method applies."""
    cut = (PruneChannels(ratio=FLOOR_RATIO, score="l2"),) if prunable else ()
    precision = precisions[0] if precisions else ()
    quick = tuple(method for method in precision if not isinstance(method, CorrectBias))
    return chain(cut, quick) or None
