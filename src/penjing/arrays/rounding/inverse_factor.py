"""The triangular factor of the inverse second moments, which says how columns make up for each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from penjing.core.errors import Refused

Array = Any
Order = Literal["activation", "given"]

STRIP = 256
"""Rows or columns that are moved at a time."""


@dataclass(frozen=True)
class InverseFactor:
    """The upper triangular U with UᵀU = H⁻¹, for columns in the order in which they are rounded.

    Attributes:
        taken: the columns in that order, `[columns]`.
        upper: U, `[columns, columns]`; what lies below its diagonal means nothing.
    """

    taken: Array
    upper: Array


@dataclass(frozen=True)
class Moments(InverseFactor):
    """The factor of damped second moments in the memory that they had, and what it says of a layer.

    Attributes:
        price: diagonal of the damped second moments, in the order of the layer's inputs, `[columns]`.
        damping: what was added to it.
    """

    price: NDArray[np.float64]
    damping: float

    @property
    def _lower(self) -> NDArray[np.float64]:
        """U with rows and columns backwards, as the libraries of linear algebra store it."""
        turned: NDArray[np.float64] = self.upper[::-1, ::-1]
        return turned

    def cost(self, change: NDArray[Any]) -> float:
        """Return trace(Δ G Δᵀ) for the second moments G before damping, at least 0.

        Args:
            change: Δ, `[rows, columns]`, in the order of the layer's inputs.
        """
        from scipy.linalg.blas import dtrsm

        found = 0.0
        for start in range(0, len(change), STRIP):
            rows = change[start : start + STRIP].astype(np.float64)
            damped = dtrsm(1.0, self._lower, rows[:, self.taken[::-1]], side=1, lower=1)
            found += float(np.vdot(damped, damped)) - self.damping * float(np.vdot(rows, rows))
        return max(found, 0.0)

    def solved(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return R H⁻¹ for the damped second moments H.

        Args:
            rows: R, `[rows, columns]`, in the order of the layer's inputs.
        """
        from scipy.linalg.blas import dtrmm

        half = dtrmm(1.0, self._lower, rows[:, self.taken[::-1]], side=1, lower=1, trans_a=1)
        whole = dtrmm(1.0, self._lower, half, side=1, lower=1, overwrite_b=1)
        found = np.empty(rows.shape)
        found[:, self.taken[::-1]] = whole
        return found


def factorized(gram: Array, order: Order) -> InverseFactor:
    """Return the factor of second moments that stay as they are.

    Args:
        gram: `[columns, columns]`, positive definite.
        order: `activation`, columns of large inputs first; `given`, as they are.
    """
    xp = array_namespace(gram)
    taken = _taken(xp.linalg.diagonal(gram), order)
    inverse = xp.linalg.inv(gram[taken][:, taken])
    return InverseFactor(taken, xp.linalg.cholesky(inverse, upper=True))


def factorized_in_place(gram: NDArray[np.float64], order: Order, damping: float) -> Moments:
    """Damp second moments and return the factor, which takes their memory and next to none beside it.

    H with its columns backwards is L Lᵀ, and L⁻¹ backwards is the upper triangular U: a Cholesky factor and
    the inverse of a triangle, both of which overwrite what they are made of.

    Args:
        gram: `[columns, columns]`, contiguous, symmetric and not negative; destroyed. Any multiple serves,
            the sum as well as the mean.
        order: as in `factorized`.
        damping: added to the diagonal, as a share of its mean, above 0; 1 where all is 0.

    Raises:
        Refused: the damped moments are not positive definite.
    """
    from scipy.linalg.lapack import dpotrf, dtrtri

    assert gram.flags.c_contiguous
    columns = len(gram)
    diagonal = gram.reshape(-1)[:: columns + 1]
    extra = damping * float(diagonal.mean()) or 1.0
    diagonal += extra
    price = diagonal.copy()
    taken = _taken(price, order)
    back = taken[::-1]
    for start in range(0, columns, STRIP):
        strip = slice(start, start + STRIP)
        gram[strip] = gram[strip][:, back]
    for start in range(0, columns, STRIP):
        strip = slice(start, start + STRIP)
        gram[:, strip] = gram[back, strip]
    factor, failed = dpotrf(gram.T, lower=1, clean=0, overwrite_a=1)
    if failed:
        raise Refused(
            "the damped second moments must be positive definite",
            value=f"not from column {failed} on",
            place="GPTQ",
            fix="raise damping",
        )
    inverse, _ = dtrtri(factor, lower=1, overwrite_c=1)
    return Moments(taken, inverse[::-1, ::-1], price, extra)


def _taken(diagonal: Array, order: Order) -> Array:
    xp = array_namespace(diagonal)
    if order == "given":
        return xp.arange(diagonal.shape[0])
    return xp.argsort(diagonal, descending=True, stable=True)
