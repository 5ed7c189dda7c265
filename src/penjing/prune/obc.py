"""Exact optimal brain surgeon: one weight at a time, with the error at every level of sparsity."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.sparsity.allocation import allocate, joined
from penjing.arrays.sparsity.gram import Gram, damped, output_error
from penjing.arrays.sparsity.obc import obc, removals
from penjing.arrays.sparsity.patterns import kept_count
from penjing.calibration.candidates import Candidate, matrices
from penjing.calibration.layerwise import Work, prepare, prune_layers
from penjing.calibration.settings import LayerWise
from penjing.core.context import Context
from penjing.core.method import Model, Outcome, handles


class PruneOBC(LayerWise):
    """Remove from each layer, weight by weight, what changes its outputs least, all others corrected.

    Frantar, Singh & Alistarh 2022, "Optimal brain compression": exact, so for layers of at most some
    thousand inputs (time grows with outputs times inputs cubed).

    Attributes:
        allocation: `uniform`: the same share of zeros in every layer; `global`: shares by the error that each
            level of sparsity causes, relative to the layer's outputs, for the least sum over layers. N:M
            leaves nothing to allocate.
    """

    allocation: Literal["uniform", "global"] = "uniform"


@handles(PruneOBC)
def prune_obc(model: Model, method: PruneOBC, context: Context) -> Outcome:
    """Prune layer by layer; one change for every layer with a weight matrix."""
    work = prepare(model, method, context)
    uniform = method.allocation == "uniform" or method.zeros.group
    return prune_layers(work, obc, None if uniform else shares(work))


def shares(work: Work) -> dict[str, float]:
    """Return the share of zeros of each layer for the least sum of relative errors at the method's total.

    Errors are those on the inputs of the dense model; every layer keeps a block at least.
    """
    curves: dict[str, NDArray[np.float64]] = {}
    for names in work.in_passes(list(work.layers)):
        for name, gram in work.grams(names).items():
            curves[name] = _curve(work.layers[name], gram, work.method)
    if not curves:
        return {}
    sizes = [len(curve) - 1 for curve in curves.values()]
    total = sum(sizes) - kept_count(sum(sizes), work.method.share)
    counts = allocate([curve[:-1] for curve in curves.values()], min(total, sum(sizes) - len(sizes)))
    return {name: count / size for name, count, size in zip(curves, counts, sizes, strict=True)}


def _curve(candidate: Candidate, gram: Gram, method: LayerWise) -> NDArray[np.float64]:
    """Return the relative error of a layer's outputs after removing 0, 1, 2, ... blocks."""
    pattern = method.zeros
    order = pattern.column_order(candidate.weight.shape)
    parts = zip(matrices(candidate, order), gram.mean[:, order][:, :, order], strict=True)
    found = [(removals(w, damped(g), pattern), output_error(w, g)) for w, g in parts]
    curve = joined([row for part, _ in found for row in part.errors])
    whole = sum(error for _, error in found)
    return curve / whole if whole > 0 else curve
