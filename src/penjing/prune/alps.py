"""Solve each layer's least-squares problem with a bound on the number of weights."""

from __future__ import annotations

from penjing.arrays.sparsity.alps import alps
from penjing.calibration.allocation import prune_corrected
from penjing.calibration.settings import Corrected
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class PruneALPS(Corrected):
    """Find each layer's sparse weights whose outputs are nearest to the dense ones, by operator splitting.

    Meng et al. 2024, "ALPS: improved optimization for highly sparse one-shot pruning for large language
    models".

    >>> PruneALPS(0.7, allocation="global").examples
    512
    """


@handles(PruneALPS)
def prune_alps(model: Model, method: PruneALPS, context: Context) -> Outcome:
    """Prune layer by layer; one change for every layer with a weight matrix."""
    return prune_corrected(model, method, context, alps)
