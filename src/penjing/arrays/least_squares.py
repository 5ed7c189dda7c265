"""Least squares from sums over the data: what weights give wanted outputs for the inputs at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What `cross_checked` chooses from: from trusting the data to mostly keeping the weights."""

CHUNK_ROWS = 8192
"""Observations that are turned to double precision at a time."""


@dataclass
class NormalEquations:
    """Sums over observations of inputs x and wanted outputs y, for `blocks` independent problems at once.

    All a linear fit needs of the data, in double precision: 8 · blocks · inputs · (inputs + outputs) bytes,
    whatever the number of observations.

    Attributes:
        count: observations seen.
        x, y: sums, `[blocks, inputs]` and `[blocks, outputs]`.
        xx, xy: sums of products, `[blocks, inputs, inputs]` and `[blocks, inputs, outputs]`.
        yy: sums of squares, `[blocks, outputs]`.
    """

    blocks: int
    inputs: int
    outputs: int
    count: int = 0
    x: Floats = field(init=False)
    y: Floats = field(init=False)
    xx: Floats = field(init=False)
    xy: Floats = field(init=False)
    yy: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.y = np.zeros((self.blocks, self.inputs)), np.zeros((self.blocks, self.outputs))
        self.xx = np.zeros((self.blocks, self.inputs, self.inputs))
        self.xy = np.zeros((self.blocks, self.inputs, self.outputs))
        self.yy = np.zeros((self.blocks, self.outputs))

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Add observations: `x [n, blocks · inputs]`, `y [n, blocks · outputs]`, block after block."""
        for start in range(0, len(x), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            a, b = _by_block(x[rows], self.blocks), _by_block(y[rows], self.blocks)
            self.count += a.shape[1]
            self.x += a.sum(1)
            self.y += b.sum(1)
            self.xx += a.transpose(0, 2, 1) @ a
            self.xy += a.transpose(0, 2, 1) @ b
            self.yy += np.square(b).sum(1)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Return the sums over both sets of observations."""
        total = NormalEquations(self.blocks, self.inputs, self.outputs, self.count + other.count)
        for name in ("x", "y", "xx", "xy", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def centred(self) -> tuple[Floats, Floats, Floats]:
        """Return xx, xy and yy of inputs and outputs less their means."""
        n = max(self.count, 1)
        xx = self.xx - self.x[:, :, None] * self.x[:, None, :] / n
        xy = self.xy - self.x[:, :, None] * self.y[:, None, :] / n
        return xx, xy, np.maximum(self.yy - np.square(self.y) / n, 0)


def refit(
    sums: NormalEquations,
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    ridge: float,
    support: NDArray[np.bool_] | None = None,
) -> tuple[Floats, Floats | None]:
    """Return the weights and the bias whose outputs are nearest to the wanted ones.

    The minimum of `Σ ‖W'x + b' − y‖² + λ ‖W' − W‖²` with `λ = ridge · trace(XᵀX) / inputs`, X centred where
    there is a bias: directions of which the data say little keep what `W` has there. Rows with the same
    support are solved together. (Ordinary ridge regression around a prior; for channels that were cut: He,
    Zhang & Sun 2017, "Channel pruning for accelerating very deep neural networks", eq. 3.)

    Args:
        sums: over the observations, at least one.
        weight: `[blocks · outputs, inputs]`, the present one.
        bias: `[blocks · outputs]`, or None: then none is fitted.
        ridge: above 0.
        support: of the weight's shape, True where a weight may differ from 0; None: everywhere.

    Returns:
        The new weight and bias, shapes as given.
    """
    xx, xy, _ = sums.centred() if bias is not None else (sums.xx, sums.xy, sums.yy)
    old = weight.reshape(sums.blocks, sums.outputs, sums.inputs).astype(np.float64)
    keep = np.ones(old.shape, bool) if support is None else support.reshape(old.shape)
    new = np.where(keep, old, 0.0)
    for block in range(sums.blocks):
        new[block] += _steps(xx[block], xy[block] - xx[block] @ new[block].T, ridge, keep[block])
    return new.reshape(weight.shape), None if bias is None else best_bias(sums, new)


def _steps(xx: Floats, residual: Floats, ridge: float, keep: NDArray[np.bool_]) -> Floats:
    """Solve for the change of each row on its support: `[outputs, inputs]`, zero elsewhere."""
    from scipy.linalg import cho_factor, cho_solve

    trace = float(np.trace(xx))
    damped = xx + np.eye(len(xx)) * (ridge * trace / len(xx) if trace > 0 else 1.0)
    step = np.zeros(keep.shape)
    patterns, member = np.unique(keep, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows, columns = np.flatnonzero(member.reshape(-1) == number), np.flatnonzero(pattern)
        if columns.size:
            part = cho_solve(cho_factor(damped[np.ix_(columns, columns)]), residual[np.ix_(columns, rows)])
            step[np.ix_(rows, columns)] = part.T
    return step


@dataclass(frozen=True)
class Fit:
    """The outcome of `cross_checked`.

    Attributes:
        weight, bias: of the layer; those given where the fit would not have helped.
        ridge: the one taken.
        before, after: `relative_error` on observations that the fit did not see.
    """

    weight: Floats
    bias: Floats | None
    ridge: float
    before: float
    after: float

    @property
    def helps(self) -> bool:
        """Whether the fit is nearer to the wanted outputs than the weights given."""
        return self.after < self.before


def cross_checked(
    fit: NormalEquations,
    check: NormalEquations,
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    ridges: tuple[float, ...] = RIDGES,
    support: NDArray[np.bool_] | None = None,
) -> Fit:
    """Refit with the ridge that errs least on observations held out, then on all observations together.

    Args:
        fit, check: over different observations, each at least one.
        weight, bias, support: as in `refit`.
        ridges: to choose from, at least one.
    """
    before = relative_error(check, weight, bias)
    errors = [relative_error(check, *refit(fit, weight, bias, ridge, support)) for ridge in ridges]
    best = int(np.argmin(errors))
    if errors[best] >= before:
        return Fit(
            weight.astype(np.float64),
            None if bias is None else bias.astype(np.float64),
            ridges[best],
            before,
            errors[best],
        )
    new, shift = refit(fit + check, weight, bias, ridges[best], support)
    return Fit(new, shift, ridges[best], before, errors[best])


def best_bias(sums: NormalEquations, weight: NDArray[Any]) -> Floats:
    """Return the bias `[blocks · outputs]` that errs least with these weights: the mean of `y − Wx`."""
    w = weight.reshape(sums.blocks, sums.outputs, sums.inputs)
    mean = np.einsum("boi,bi->bo", w, sums.x, optimize=True)
    shift: Floats = ((sums.y - mean) / max(sums.count, 1)).reshape(-1)
    return shift


def relative_error(sums: NormalEquations, weight: NDArray[Any], bias: NDArray[Any] | None) -> float:
    """Return `Σ ‖Wx + b − y‖² / Σ ‖y − mean(y)‖²`: 0 is exact, 1 as good as the mean.

    Args:
        sums: over the observations, at least one.
        weight: `[blocks · outputs, inputs]`.
        bias: `[blocks · outputs]`, or None for none.
    """
    w = weight.reshape(sums.blocks, sums.outputs, sums.inputs).astype(np.float64)
    b = np.zeros((sums.blocks, sums.outputs)) if bias is None else bias.reshape(sums.blocks, -1).astype(float)
    mean = np.einsum("boi,bi->bo", w, sums.x)
    squares = np.einsum("boi,bij,boj->bo", w, sums.xx, w, optimize=True)
    total = squares + sums.yy + sums.count * np.square(b)
    total += 2 * (b * (mean - sums.y) - np.einsum("boi,bio->bo", w, sums.xy))
    spread = float(sums.centred()[2].sum())
    error = max(float(total.sum()), 0.0)
    return error / spread if spread > 0 else float(error > 0)


def _by_block(rows: NDArray[Any], blocks: int) -> Floats:
    return rows.astype(np.float64).reshape(len(rows), blocks, -1).transpose(1, 0, 2)
