"""The optimal brain surgeon on whole units: what goes next, and what is lost once the rest is refitted.

A layer y = W x is to do with fewer of its inputs, and W is refitted by least squares after every removal.
What a removal then adds to the error, and the inverse moments of the inputs that are left, are known in
closed form (Hassibi & Stork 1993; for structures Kurtic, Frantar & Alistarh 2023, "ZipLM"). Errors are
weighed by the second moments of the loss's gradient by y, which with those of x are the Kronecker factors of
the curvature (Martens & Grosse 2015, "K-FAC"; for pruning Wang et al. 2019, "EigenDamage"). Pure functions on
arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import KroneckerFactors

Floats = NDArray[np.float64]
Units = NDArray[np.int64]

DAMPING = 1e-4
"""Added to the diagonal of the inputs' moments, as a share of its mean."""


@dataclass(frozen=True)
class Consumer:
    """A layer that takes units: its weight `[rows, columns]`, units of columns (or -1), its factors."""

    weight: Floats
    units: Units
    factors: KroneckerFactors


class _Sweep:
    """One consumer while units go: the weight so far, and the inverse moments of what is left."""

    def __init__(self, consumer: Consumer) -> None:
        inputs = np.array(consumer.factors.inputs, np.float64)
        columns = len(inputs) - 1
        mean = float(np.trace(inputs[:-1, :-1])) / max(columns, 1)
        diagonal = np.append(np.full(columns, DAMPING), DAMPING * 1e-3) * max(mean, 1e-30)
        values, vectors = np.linalg.eigh(consumer.factors.slopes)
        metric = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
        self._inverse: Floats = np.asarray(np.linalg.inv(inputs + np.diag(diagonal)), np.float64)
        self._weight: Floats = np.append(metric @ consumer.weight, np.zeros((len(metric), 1)), 1)
        self._units = np.append(consumer.units, -1)

    def costs(self, size: int) -> Floats:
        """Return what each unit's removal would add, `[size]`; 0 for units that are gone."""
        found = np.zeros(size)
        counts = np.bincount(self._units[self._units >= 0], minlength=size)
        order = np.argsort(self._units, kind="stable")[np.count_nonzero(self._units < 0) :]
        for count in np.unique(counts[counts > 0]):
            alike = np.flatnonzero(counts == count)
            columns = order[np.isin(self._units[order], alike)].reshape(len(alike), count)
            blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
            weights = self._weight[:, columns].transpose(1, 2, 0)
            found[alike] = (np.linalg.solve(blocks, weights) * weights).sum((1, 2))
        return found

    def remove(self, units: Units) -> float:
        """Take units out, refit, and return the error that it adds."""
        columns = np.flatnonzero(np.isin(self._units, units))
        cost, towards = self._joint(columns)
        rest = np.flatnonzero(~np.isin(self._units, units))
        across = self._inverse[np.ix_(columns, rest)]
        self._weight = self._weight[:, rest] - towards @ across
        solved = np.linalg.solve(self._inverse[np.ix_(columns, columns)], across)
        self._inverse = self._inverse[np.ix_(rest, rest)] - across.T @ solved
        self._units = self._units[rest]
        return cost

    def _joint(self, columns: Units) -> tuple[float, Floats]:
        """Return tr(W_c (K_cc)⁻¹ W_cᵀ) and W_c (K_cc)⁻¹ for some columns c."""
        block = self._inverse[np.ix_(columns, columns)]
        towards: Floats = np.asarray(np.linalg.solve(block, self._weight[:, columns].T).T, np.float64)
        return float((towards * self._weight[:, columns]).sum()), towards


def surgeon(consumers: Sequence[Consumer], blocks: Units, widths: Units) -> tuple[Units, Floats]:
    """Remove units down through the widths, each time those that cost least, and note what is lost.

    Args:
        consumers: the layers that take the units.
        blocks: `[size]`, the block of every unit; equally many go from each.
        widths: that a group may have, ascending, the last the whole.

    Returns:
        Units from the one that stays longest to the one that goes first `[size]`, of which as many as a width
        says stay, from the front; and half the error that each width adds `[widths]`, the last 0.
    """
    size, sweeps = len(blocks), [_Sweep(consumer) for consumer in consumers]
    left, gone = np.ones(size, bool), list[int]()
    losses, total = [0.0], 0.0
    for narrower in widths[-2::-1]:
        costs = np.sum([sweep.costs(size) for sweep in sweeps], axis=0)
        each = (int(left.sum()) - int(narrower)) // len(np.unique(blocks))
        parts = []
        for block in np.unique(blocks):
            mine = np.flatnonzero(left & (blocks == block))
            parts.append(mine[np.argsort(costs[mine], kind="stable")[:each]])
        units = np.concatenate(parts)
        total += sum(sweep.remove(units) for sweep in sweeps)
        left[units] = False
        gone.extend(units.tolist())
        losses.append(total / 2)
    order = np.array([*np.flatnonzero(left), *gone[::-1]], np.int64)
    return order, np.array(losses[::-1])


STEPS = 64
"""Removals in which `scores` takes a group apart, at most; each removes the cheapest of what is left."""


def scores(consumers: Sequence[Consumer], blocks: Units) -> Floats:
    """Return for each unit what its removal adds when those that cost less are gone already, `[size]`.

    Rises in the order in which units go, so that units of several groups can be ranked together.

    Args:
        consumers: the layers that take the units.
        blocks: `[size]`, the block of every unit; equally many go from each.
    """
    size, each = len(blocks), len(np.unique(blocks))
    step = max(1, round(size / each / STEPS)) * each
    widths = np.unique(np.append(np.arange(size, 0, -step), each))
    order, losses = surgeon(consumers, blocks, widths)
    gone = np.diff(widths)
    marginal = np.maximum.accumulate((-np.diff(losses) / gone)[::-1])[::-1]
    found = np.empty(size)
    found[order] = np.repeat(np.append(marginal[:1], marginal), np.append(widths[0], gone))
    return found
