"""AWQ: inputs scaled before rounding, so that weights of large inputs err less."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import rounded
from penjing.arrays.formats.parameters import Parameters
from penjing.arrays.sparsity.gram import output_error
from penjing.core.number_format import NumberFormat

Array = Any

ALPHAS = tuple(step / 20 for step in range(21))
SHRINKS = (1.0, 0.9, 0.8, 0.7)
"""Clipping that is tried while alpha is searched for."""


def awq(weight: Array, gram: Array, format: NumberFormat) -> tuple[Array, float]:
    """Return factors for the inputs under which rounding changes the outputs least, and their exponent.

    Factors are the inputs' root mean squares to the power of alpha, which is searched from 0 (no factors) to
    1; weights are multiplied by them before rounding and inputs divided. Lin et al. 2024, "AWQ:
    Activation-aware weight quantization for on-device LLM compression and acceleration", equations 4 and 5,
    which take means of magnitudes instead.

    Args:
        weight: `[rows, columns]`, of all layers that share the inputs.
        gram: mean of x xᵀ, `[columns, columns]`.
        format: with a scale for each row, or for each group of columns of a row.

    Returns:
        Factors `[columns]`, above 0, the product of the largest and the smallest being 1; and alpha.
    """
    xp = array_namespace(weight, gram)
    power = xp.linalg.diagonal(gram)
    size = xp.sqrt(xp.maximum(power, 1e-8 * xp.max(power)))
    best, least, chosen = xp.ones_like(size), float("inf"), 0.0
    if float(xp.max(power)) <= 0:
        return best, chosen
    for alpha in ALPHAS:
        factors = size**alpha
        factors = factors / xp.sqrt(xp.max(factors) * xp.min(factors))
        scaled = weight * factors
        parameters = importance_clipped(scaled, power / factors**2, format, SHRINKS)
        change = rounded(scaled, format, *parameters) / factors - weight
        error = output_error(change, gram)
        if error < least:
            best, least, chosen = factors, error, alpha
    return best, chosen


def importance_clipped(
    weight: Array, power: Array, format: NumberFormat, factors: tuple[float, ...] | None = None
) -> Parameters:
    """Return the parameters by clip search, each squared error counting as the mean square of its input.

    Args:
        weight: `[rows, columns]`.
        power: mean of x², `[columns]`.
        format: of the weight.
        factors: as of `clipped_parameters`, whose grid is for integers.
    """
    coarse = factors if format.kind in ("integer", "nf4") else None
    return clipped_parameters(weight, format, coarse, power[None, :])
