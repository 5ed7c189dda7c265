"""How many zeros each layer gets: by the error that each level of sparsity causes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.sparsity.allocation import allocate, joined
from penjing.arrays.sparsity.gram import Gram, damped, output_error
from penjing.arrays.sparsity.obc import removals
from penjing.arrays.sparsity.patterns import Pattern, kept_count
from penjing.calibration.candidates import Candidate, to_matrices
from penjing.calibration.layerwise import Inputs, Solve, Work, prepare, prune_layers
from penjing.calibration.settings import Corrected
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.value import Model


def prune_corrected(model: Model, method: Corrected, context: Context, solve: Solve) -> Outcome:
    """Allocate zeros to layers and prune them one by one; one change for each.

    Raises:
        Refused: no training data, or inputs of a layer that are not finite.
    """
    inputs = Inputs(method.examples, method.batch_size, method.sequential, method.compensate)
    work = prepare(model, method, context, inputs)
    uniform = method.uniform or method.zeros.group
    return prune_layers(work, solve, None if uniform else allocate_shares(work))


def allocate_shares(work: Work) -> dict[str, float]:
    """Return the share of zeros of each layer for the least sum of relative errors at the method's total.

    Errors are those of exact optimal brain surgeon on the inputs of the dense model; every layer keeps a
    block at least. Takes about `out * (in * kernel)**3 / 6` multiply-adds for each layer.
    """
    curves: dict[str, NDArray[np.float64]] = {}
    for names in work.split_by_memory(list(work.layers)):
        for name, gram in work.grams(names).items():
            curves[name] = error_curve(work.layers[name], gram, work.method.zeros)
    if not curves:
        return {}
    sizes = [len(curve) - 1 for curve in curves.values()]
    total = sum(sizes) - kept_count(sum(sizes), work.method.share)
    counts = allocate([curve[:-1] for curve in curves.values()], min(total, sum(sizes) - len(sizes)))
    return {name: count / size for name, count, size in zip(curves, counts, sizes, strict=True)}


def error_curve(candidate: Candidate, gram: Gram, pattern: Pattern) -> NDArray[np.float64]:
    """Return the relative error of a layer's outputs after removing 0, 1, 2, ... blocks, `[blocks + 1]`."""
    order = pattern.column_order(candidate.weight.shape)
    parts = zip(to_matrices(candidate, order), gram.mean[:, order][:, :, order], strict=True)
    found = [(removals(w, damped(g), pattern), output_error(w, g)) for w, g in parts]
    curve = joined([row for part, _ in found for row in part.errors])
    whole = sum(error for _, error in found)
    return curve / whole if whole > 0 else curve
