"""Exact optimal brain surgeon: one weight at a time, all others at their optimum."""

from __future__ import annotations

from penjing.arrays.sparsity.obc import obc
from penjing.calibration.allocation import prune_corrected
from penjing.calibration.settings import Corrected
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class PruneOBC(Corrected):
    """Remove from each layer, weight by weight, what changes its outputs least, all others corrected.

    Frantar, Singh & Alistarh 2022, "Optimal brain compression": exact, so for layers of at most some
    thousand inputs (time grows with outputs times inputs cubed).

    >>> PruneOBC(pattern="2:4").sparsity
    0.5
    """


@handles(PruneOBC)
def prune_obc(model: Model, method: PruneOBC, context: Context) -> Outcome:
    """Prune layer by layer; one change for every layer with a weight matrix."""
    return prune_corrected(model, method, context, obc)
