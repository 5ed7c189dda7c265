"""Weights times the norm of the activations that they multiply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores.units import Floats, Tensors, consumers, sum_by_index, to_units
from penjing.core.backend import Group


def activation_score(
    groups: Sequence[Group], tensors: Tensors, inputs: Iterable[Mapping[str, NDArray[np.floating]]]
) -> dict[str, Floats]:
    """Return for each unit `sum of |W_ij| ||X_j||_2` over the weights that take it as input.

    (Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), there for
    single weights.) `||X_j||` is over all positions, per example; no gradients and no labels.

    Args:
        groups: the units.
        tensors: weights by layer and name.
        inputs: for each batch, the inputs of layers: `[examples, channels, *spatial]` of convolutions,
            channels last of others; walked once.

    Returns:
        By group name, shape `[group.size]`, at least 0; without groups that have no consumer or of
        which one is missing.
    """
    ranks = {s.layer: tensors[s.layer][s.tensor].ndim for g in groups for s in consumers(g)}
    squares: dict[str, Floats] = defaultdict(lambda: np.zeros(1))
    examples = 0
    for batch in inputs:
        examples += len(next(iter(batch.values()), ()))
        for layer in batch.keys() & ranks.keys():
            squares[layer] = squares[layer] + _energy(batch[layer], ranks[layer])
    norms = {layer: np.sqrt(total / max(examples, 1)) for layer, total in squares.items()}
    found = {}
    for group in groups:
        slots = consumers(group)
        if slots and all(len(norms.get(s.layer, ())) == len(s.units) for s in slots):
            total = np.zeros(group.size)
            for s in slots:
                weights = sum_by_index(np.abs(tensors[s.layer][s.tensor]), s)
                total += to_units(weights * norms[s.layer], s, group.size)
            found[group.name] = total
    return found


def _energy(x: NDArray[np.floating], rank_of_weight: int) -> Floats:
    axis = 1 if rank_of_weight > 2 else x.ndim - 1
    others = tuple(a for a in range(x.ndim) if a != axis)
    return np.asarray(np.square(x, dtype=np.float64).sum(axis=others))
