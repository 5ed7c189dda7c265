"""Make those weights zero whose product with their input is small."""

from __future__ import annotations

from penjing.arrays.sparsity.wanda import wanda
from penjing.calibration.layerwise import prepare, prune_layers
from penjing.calibration.settings import LayerWise
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class PruneWanda(LayerWise):
    """Make the weights of least |W|·‖x‖ zero, the same share for every output; the others stay as they are.

    Sun et al. 2023, "A simple and effective pruning approach for large language models". Blocks go by the
    sum of squares.
    """


@handles(PruneWanda)
def prune_wanda(model: Model, method: PruneWanda, context: Context) -> Outcome:
    """Prune layer by layer; one change for every layer with a weight matrix."""
    return prune_layers(prepare(model, method, context), wanda, updates=False)
