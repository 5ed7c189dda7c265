"""ALPS: the layer's least-squares problem with a bound on the number of weights, by operator splitting."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from penjing.arrays.sparsity.patterns import Pattern, mask_of

Array = Any

RHO = 0.1
EVERY = 3
"""Iterations between two updates of the penalty."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""The penalty grows by the factor of the first line whose share of the support has changed."""
ITERATIONS = 300
REFINEMENTS = 100
TOLERANCE = 1e-6


def alps(weight: Array, gram: Array, sparsity: float, pattern: Pattern) -> tuple[Array, Array]:
    """Return the sparse matrix whose outputs are nearest to those of a dense one.

    Minimises trace((B − W) G (B − W)ᵀ) with a bounded number of non-zero weights: ADMM on B = D with D
    sparse, the penalty rising until the support stands still, then conjugate gradients on the support.
    Columns are first scaled to inputs of norm one. (Meng et al. 2024, "ALPS: improved optimization for highly
    sparse one-shot pruning for large language models", algorithm 1, section 3.)

    Args:
        weight: `[rows, columns]` in double precision, columns in the pattern's `column_order`.
        gram: damped mean of x xᵀ, `[columns, columns]`, positive definite.
        sparsity: share of zeros in (0, 1), over all rows together; N:M has its own.
        pattern: the matrix fits it.

    Returns:
        The new weight, and its mask (True where kept).
    """
    xp = array_namespace(weight, gram)
    scale = xp.sqrt(xp.linalg.diagonal(gram))
    scaled, unit = weight * scale, gram / (scale[:, None] * scale[None, :])
    mask = admm_support(scaled, unit, sparsity, pattern)
    return conjugate_gradients(scaled, unit, mask) / scale, mask


def admm_support(weight: Array, gram: Array, sparsity: float, pattern: Pattern) -> Array:
    """Return the support that ADMM settles on, booleans `[rows, columns]`.

    Args:
        weight: `[rows, columns]`.
        gram: `[columns, columns]`, positive definite, ones on the diagonal.
        sparsity, pattern: as of `alps`.
    """
    xp = array_namespace(weight, gram)
    values, vectors = xp.linalg.eigh(gram)
    wanted = weight @ gram
    sparse, dual = weight, xp.zeros_like(weight)
    mask = before = mask_of(weight**2, sparsity, pattern)
    rho = RHO
    for iteration in range(1, ITERATIONS + 1):
        right = wanted - dual + rho * sparse
        dense = ((right @ vectors) / (values + rho)) @ vectors.T
        target = dense + dual / rho
        mask = mask_of(target**2, sparsity, pattern)
        sparse = xp.where(mask, target, xp.zeros_like(target))
        dual = dual + rho * (dense - sparse)
        if iteration % EVERY == 0:
            changed = int(xp.sum(xp.astype(mask != before, xp.int64)))
            if changed == 0:
                break
            kept = int(xp.sum(xp.astype(mask, xp.int64)))
            rho *= next(factor for share, factor in GROWTH if changed >= share * kept)
            before = mask
    return mask


def conjugate_gradients(weight: Array, gram: Array, mask: Array) -> Array:
    """Return the least-squares weights on a support, all rows at once.

    Minimises trace((B − W) G (B − W)ᵀ) over B that is zero outside the mask, from the masked W.

    Args:
        weight: `[rows, columns]`.
        gram: `[columns, columns]`, positive definite, ones on the diagonal (so that no other preconditioner
            is needed).
        mask: booleans `[rows, columns]`, True where kept.
    """
    xp = array_namespace(weight, gram)
    zero = xp.zeros_like(weight)
    solution = xp.where(mask, weight, zero)
    residual = xp.where(mask, (weight - solution) @ gram, zero)
    direction, energy = residual, _rows(xp, residual**2)
    enough = TOLERANCE**2 * _rows(xp, (weight @ gram) ** 2)
    for _ in range(REFINEMENTS):
        active = energy > enough
        if not bool(xp.any(active)):
            break
        image = xp.where(mask, direction @ gram, zero)
        curvature = _rows(xp, direction * image)
        step = xp.where(active, energy / xp.where(curvature > 0, curvature, 1.0), 0.0)
        solution = solution + step[:, None] * direction
        residual = residual - step[:, None] * image
        fresh = _rows(xp, residual**2)
        ratio = xp.where(active, fresh / xp.where(energy > 0, energy, 1.0), 0.0)
        direction, energy = residual + ratio[:, None] * direction, fresh
    return solution


def _rows(xp: Any, values: Array) -> Array:
    return xp.sum(values, axis=1)
