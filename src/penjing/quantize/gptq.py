"""Round weights in one sweep over the columns, later columns making up for earlier ones."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.parameters import Parameters
from penjing.arrays.rounding.gptq import gptq
from penjing.arrays.sparsity.gram import DAMPING, Gram, compensated, damped
from penjing.calibration.rounding import RoundedWeights
from penjing.calibration.rounding_in_order import round_in_order
from penjing.core.context import Context
from penjing.core.method import Model, Outcome, handles
from penjing.core.number_format import NumberFormat

COMPENSATION = 0.5
"""Share of the way to the float model's outputs; all of it learns the calibration data by heart."""


class QuantizeGPTQ(RoundedWeights):
    """Round weights column by column, the columns that follow correcting the outputs.

    Layer by layer in the order of the data, each on the inputs that the layers rounded before it give, so
    that the memory needed is that of one layer. Frantar et al. 2023, "GPTQ: Accurate post-training
    quantization for generative pre-trained transformers".

    Attributes:
        order: `activation`: columns of large inputs first, under scales fixed beforehand; `given`: columns
            as they are stored, under scales of groups that are taken when the sweep comes to them.
        compensate: aim at the outputs that the layer had in the float model on its float inputs, so that
            errors of the layers before it are made up for (the asymmetric calibration of Li et al. 2025,
            "GPTAQ"): the weight is first moved half of the way to the least squares solution for them.
        damping: added to the diagonal of the second moments, as a share of its mean, in (0, 1].
        batch_size: examples that run at once, at least 1.
    """

    order: Literal["activation", "given"] = "activation"
    compensate: bool = False
    damping: float = Field(default=DAMPING, gt=0, le=1)
    batch_size: int = Field(default=32, ge=1)


@handles(QuantizeGPTQ, "torch")
def quantize_gptq(model: Model, method: QuantizeGPTQ, context: Context) -> Outcome:
    """Put quantizers on the model and round layer by layer; one change for every layer.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; quantized already.
    """
    solve = partial(_solve, method)
    return round_in_order(model, method, context, solve, method.batch_size, method.compensate)


def _solve(
    method: QuantizeGPTQ, weight: NDArray[Any], gram: Gram, format: NumberFormat
) -> tuple[NDArray[Any], Parameters]:
    moments = [damped(part, method.damping) for part in gram.mean]
    if gram.drift is not None:
        parts = zip(weight, moments, gram.drift, strict=True)
        weight = np.stack([compensated(w, g, COMPENSATION * drift) for w, g, drift in parts])
    groups, rows, columns = weight.shape
    price = np.repeat(np.stack([np.diagonal(part) for part in moments]), rows, axis=0)
    start = clipped_parameters(weight.reshape(-1, columns), format, importance=price)
    found = [
        gptq(w, g, format, _rows(start, part, groups), method.order)
        for part, (w, g) in enumerate(zip(weight, moments, strict=True))
    ]
    return np.stack([values for values, _ in found]), _joined([parameters for _, parameters in found])


def _rows(parameters: Parameters, part: int, parts: int) -> Parameters:
    """Return the parameters of one of several equal parts of the rows."""
    scales, zeros = (None if x is None else np.split(x, parts)[part] for x in parameters[:2])
    return Parameters(scales, zeros, parameters.tensor_scale)


def _joined(parts: list[Parameters]) -> Parameters:
    zeros = None if parts[0].zero_points is None else np.concatenate([p.zero_points for p in parts])
    return Parameters(np.concatenate([p.scales for p in parts]), zeros, parts[0].tensor_scale)
