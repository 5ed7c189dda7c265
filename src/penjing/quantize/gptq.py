"""Round weights in one sweep over the columns, later columns making up for earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.parameters import Parameters
from penjing.arrays.rounding.gptq import sweep
from penjing.arrays.rounding.inverse_factor import Moments, factorized_in_place
from penjing.arrays.sparsity.gram import DAMPING, Gram
from penjing.calibration.rounding import Rounded
from penjing.calibration.rounding_in_order import Rounding, round_in_order
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.number_format import NumberFormat, number_format
from penjing.core.registry import handles
from penjing.core.value import Model

COMPENSATION = 0.5
"""Share of the way to the float model's outputs; all of it learns the calibration data by heart."""
ROWS = 512
"""Rows that are rounded at a time."""


class QuantizeGPTQ(Rounded):
    """Round weights column by column, the columns that follow correcting the outputs.

    Layer by layer in the order of the data, each on the inputs that the layers rounded before it give, so
    that the memory needed is that of one layer. Frantar et al. 2023, "GPTQ: Accurate post-training
    quantization for generative pre-trained transformers".

    Attributes:
        weights: 4-bit integers in groups of 32 inputs by default.
        inputs: float by default.
        order: `activation`: columns of large inputs first, under scales fixed beforehand; `given`: columns
            as they are stored, under scales of groups that are taken when the sweep comes to them.
        compensate: aim at the outputs that the layer had in the float model on its float inputs, so that
            errors of the layers before it are made up for (the asymmetric calibration of Li et al. 2025,
            "GPTAQ"): the weight is first moved half of the way to the least squares solution for them.
        damping: added to the diagonal of the second moments, as a share of its mean, in (0, 1].

    >>> QuantizeGPTQ("int3 group 64", compensate=True).examples
    256
    """

    weights: NumberFormat = number_format("int4 group 32")
    inputs: NumberFormat | None = None
    order: Literal["activation", "given"] = "activation"
    compensate: bool = False
    damping: float = Field(default=DAMPING, gt=0, le=1)


@handles(QuantizeGPTQ, "torch")
def quantize_gptq(model: Model, method: QuantizeGPTQ, context: Context) -> Outcome:
    """Put quantizers on the model and round layer by layer; one change for every layer.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; quantized already.
    """
    return round_in_order(model, method, context, partial(_solve, method), method.compensate)


def _solve(method: QuantizeGPTQ, weight: NDArray[np.float32], gram: Gram, format: NumberFormat) -> Rounding:
    """Round the groups of a layer; the second moments are used up, whose memory is what the inverse takes."""
    drift = gram.crossed
    if drift is not None:
        drift -= gram.total
    moments = [factorized_in_place(part, method.order, method.damping) for part in gram.total]
    wanted: Sequence[NDArray[np.floating]] = list(weight)
    if drift is not None:
        parts = zip(weight, moments, drift, strict=True)
        wanted = [part + COMPENSATION * m.solved(part @ off) for part, m, off in parts]
    new, found = np.empty_like(weight), list[Parameters]()
    for part, rows, start in _starts(wanted, moments, format):
        whole = wanted[part][rows].astype(np.float64)
        new[part, rows], parameters = sweep(whole, moments[part], format, start, method.order)
        found.append(parameters)

    def cost(change: NDArray[np.floating]) -> float:
        return sum(m.cost(part) for m, part in zip(moments, change, strict=True))

    return Rounding(new, _joined(found), cost)


def _starts(
    weight: Sequence[NDArray[np.floating]], moments: Sequence[Moments], format: NumberFormat
) -> Iterator[tuple[int, slice, Parameters]]:
    """Yield some rows of a group at a time, with scales that clip search finds for them.

    Where all rows have one scale above their own, it is that of the whole.
    """
    whole = None
    if format.kind == "nvfp4":
        price = np.concatenate(
            [np.broadcast_to(m.price, w.shape) for m, w in zip(moments, weight, strict=True)]
        )
        whole = clipped_parameters(np.concatenate(weight), format, importance=price)
    for part, (matrix, m) in enumerate(zip(weight, moments, strict=True)):
        for start in range(0, len(matrix), ROWS):
            rows = slice(start, min(start + ROWS, len(matrix)))
            if whole is None:
                yield part, rows, clipped_parameters(matrix[rows], format, importance=m.price)
            else:
                yield part, rows, _rows(whole, part * len(matrix) + start, rows)


def _rows(parameters: Parameters, first: int, rows: slice) -> Parameters:
    """Return the parameters of as many rows as a slice has, from the first on."""
    chosen = slice(first, first + rows.stop - rows.start)
    scales, zeros = (None if x is None else x[chosen] for x in parameters[:2])
    return Parameters(scales, zeros, parameters.tensor_scale)


def _joined(parts: list[Parameters]) -> Parameters:
    zeros = None if parts[0].zero_points is None else np.concatenate([p.zero_points for p in parts])
    return Parameters(np.concatenate([p.scales for p in parts]), zeros, parts[0].tensor_scale)
