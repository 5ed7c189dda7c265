"""Sparse weights of a whole network from gradients by example: least squares with a bound on their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Choose = Callable[[Floats], NDArray[np.bool_]]
"""From weights `[weights]` to where the largest that are allowed stay."""

GAIN = 1e-4
"""An iteration that lowers the value by a smaller share than this is the last."""

LENGTHS = (1, 4, 16)
"""Steps that are tried, in lengths of the best one along the gradient."""


@dataclass(frozen=True)
class Quadratic:
    """`½ mean (eᵢ + aᵢᵀd)² + ½ ridge ‖d‖²` of a change d of the weights.

    With aᵢ the gradient of an output of example i and eᵢ how far this output is from where it should be: what
    remains of it after the change, and a pull back. (Benbaki et al. 2023, "Fast as CHITA: neural network
    pruning with combinatorial optimization", eq. 4; Singh & Alistarh 2020, "WoodFisher", for e = 0.)

    Attributes:
        rows: a, `[examples, weights]`.
        errors: e, `[examples]`.
        ridge: above 0.
    """

    rows: Floats
    errors: Floats
    ridge: float

    def value(self, change: Floats) -> float:
        """Return the value at a change `[weights]`."""
        left = (self.errors + self.rows @ change).astype(np.float64)
        return float(np.square(left).mean() + self.ridge * np.square(change.astype(np.float64)).sum()) / 2

    def slope(self, change: Floats) -> Floats:
        """Return the gradient at a change, `[weights]`."""
        left = self.errors + self.rows @ change
        return np.asarray(left @ self.rows / np.float32(len(self.rows)) + np.float32(self.ridge) * change)

    def step(self, change: Floats) -> Floats:
        """Return the change after the best step down the gradient."""
        slope = self.slope(change)
        bend = float(np.square((self.rows @ slope).astype(np.float64)).mean())
        length = float(np.square(slope.astype(np.float64)).sum())
        return change - np.float32(length / (bend + self.ridge * length) if length else 0.0) * slope


def best_on_support(quadratic: Quadratic, weights: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Return the weights that minimise the quadratic among those that are zero outside a mask.

    Exact, by a system of as many unknowns as there are examples (Woodbury; CHITA's back-solve).

    Args:
        quadratic: of changes from `weights`.
        weights: `[weights]`.
        mask: True where kept.
    """
    change = np.where(mask, np.float32(0), -weights)
    errors = (quadratic.errors + quadratic.rows @ change).astype(np.float64)
    inside = quadratic.rows[:, mask]
    system = (inside @ inside.T).astype(np.float64)
    system[np.diag_indices_from(system)] += quadratic.ridge * len(system)
    change[mask] = -(np.linalg.solve(system, errors).astype(np.float32) @ inside)
    return np.asarray(weights + change)


def best_sparse(quadratic: Quadratic, weights: Floats, choose: Choose, iterations: int) -> Floats:
    """Return weights with a bound on their number for which the quadratic is small.

    Iterative hard thresholding: from the largest weights, down the gradient, the largest of what comes out,
    the best weights there; as long as that helps. Steps are the best one along the gradient and multiples of
    it, as shorter ones seldom change the support (CHITA, section 3.2).

    Args:
        quadratic: of changes from `weights`.
        weights: `[weights]`.
        choose: the bound.
        iterations: at most so many after the first support.
    """
    best = best_on_support(quadratic, weights, choose(weights))
    value = quadratic.value(best - weights)
    for _ in range(iterations):
        step: Floats = quadratic.step(best - weights) - (best - weights)
        for factor in LENGTHS:
            mask = choose(np.asarray(best + np.float32(factor) * step, np.float32))
            if not mask[best != 0].all():
                fresh = best_on_support(quadratic, weights, mask)
                reached = quadratic.value(fresh - weights)
                if reached < value * (1 - GAIN):
                    best, value = fresh, reached
                    break
        else:
            break
    return best
