"""Prune in one sweep over the columns of each weight, later columns making up for earlier ones."""

from __future__ import annotations

from penjing.arrays.sparsity.sparsegpt import sparsegpt
from penjing.calibration.allocation import prune_corrected
from penjing.calibration.settings import Corrected
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class PruneSparseGPT(Corrected):
    """Prune each layer column by column, the columns that follow correcting the outputs.

    Frantar & Alistarh 2023, "SparseGPT: Massive language models can be accurately pruned in one-shot".

    >>> PruneSparseGPT(0.5, examples=128).batch_size
    64
    """


@handles(PruneSparseGPT)
def prune_sparsegpt(model: Model, method: PruneSparseGPT, context: Context) -> Outcome:
    """Prune layer by layer; one change for every layer with a weight matrix."""
    return prune_corrected(model, method, context, sparsegpt)
