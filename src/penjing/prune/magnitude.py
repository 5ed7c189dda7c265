"""Make the smallest weights zero."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.sparsity.patterns import global_masks, mask_of
from penjing.calibration.candidates import (
    Candidate,
    describe_mask,
    find_candidates,
    from_matrices,
    keep_masks,
    to_matrices,
)
from penjing.calibration.settings import Sparse
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class PruneMagnitude(Sparse):
    """Make the weights of smallest magnitude zero; needs no data.

    Han et al. 2015, "Learning both weights and connections for efficient neural networks"; blocks go by the
    sum of their squares.

    Attributes:
        scope: `global`: one threshold for all layers; `layer`: the same share of zeros in every layer. N:M is
            the same either way.
        floor: with `global`, the share of its weights that every layer keeps at least, from 0 to below 1;
            one weight stays in any case.

    >>> PruneMagnitude(0.5, scope="layer").pattern
    'unstructured'
    """

    scope: Literal["global", "layer"] = "global"
    floor: float = Field(default=0.02, ge=0, lt=1)

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the same share of zeros."""
        return self.scope == "layer"


@handles(PruneMagnitude)
def prune_magnitude(model: Model, method: PruneMagnitude, context: Context) -> Outcome:
    """Write zeros and remember the masks; one change for every layer with a weight matrix."""
    found, changes = find_candidates(model, method, context)
    masks = _masks(found, method)
    for candidate in found:
        mask = masks[candidate.name]
        context.backend.write(model, candidate.name, {"weight": np.where(mask, candidate.weight, 0)})
        changes.done(candidate.name, **describe_mask(mask))
    keep_masks(model, context, masks)
    return Outcome(model, changes)


def _masks(found: list[Candidate], method: PruneMagnitude) -> dict[str, NDArray[np.bool_]]:
    pattern = method.zeros
    orders = {c.name: pattern.column_order(c.weight.shape) for c in found}
    parts = {c.name: to_matrices(c, orders[c.name]) for c in found}
    scores = {name: np.square(part.reshape(-1, part.shape[2])) for name, part in parts.items()}
    if method.scope == "layer" or pattern.group or not scores:
        chosen = {name: mask_of(score, method.share, pattern) for name, score in scores.items()}
    else:
        chosen = global_masks(scores, method.share, pattern, method.floor)
    return {
        c.name: from_matrices(c, chosen[c.name].reshape(parts[c.name].shape), orders[c.name]) for c in found
    }
