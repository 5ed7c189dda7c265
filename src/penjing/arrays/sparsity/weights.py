"""Masks of weights in their own shapes: what `patterns` does for matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.sparsity.patterns import Pattern, global_masks, mask_of


def weight_masks(
    scores: Mapping[str, NDArray[Any]],
    sparsity: float,
    pattern: Pattern,
    scope: Literal["global", "layer"],
    floor: float = 0.0,
) -> dict[str, NDArray[np.bool_]]:
    """Return where the weights of highest score stay.

    Args:
        scores: by name, in the shape of the weight `[out, in, *kernel]`; the pattern fits each.
        sparsity: share of zeros in [0, 1); N:M has its own.
        pattern: which zeros are allowed.
        scope: `global`: one threshold for all weights; `layer`: the same share of each. N:M is the same
            either way.
        floor: with `global`, the share of its weights that each keeps at least; one stays in any case.

    Returns:
        By name, True where kept, in the shape of the scores.
    """
    orders = {name: pattern.column_order(score.shape) for name, score in scores.items()}
    matrices = {n: s.reshape(len(s), math.prod(s.shape[1:]))[:, orders[n]] for n, s in scores.items()}
    if scope == "layer" or pattern.group or not scores:
        chosen = {name: mask_of(matrix, sparsity, pattern) for name, matrix in matrices.items()}
    else:
        chosen = global_masks(matrices, sparsity, pattern, floor)
    masks = {}
    for name, score in scores.items():
        mask = np.empty_like(chosen[name])
        mask[:, orders[name]] = chosen[name]
        masks[name] = mask.reshape(score.shape)
    return masks
