"""Round weights after scaling inputs so that those of large inputs err less."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from penjing.arrays.rounding.awq import awq, importance_clipped
from penjing.arrays.sparsity.gram import output_error
from penjing.calibration.inputs import in_passes, input_grams
from penjing.calibration.placing import quantizer_of
from penjing.calibration.rounding import RoundedWeights
from penjing.calibration.rounding_in_order import begin
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.number_format import NumberFormat
from penjing.core.progress import Line
from penjing.core.registry import handles
from penjing.core.value import Model

Facts = dict[str, float | int | str]


class QuantizeAWQ(RoundedWeights):
    """Scale the inputs of linear layers, and the weights by the inverse, so that rounding changes least.

    The layer that makes the inputs, a normalization or a linear layer, takes the scales, so that the float
    model stays the same: they cost nothing when it runs. Lin et al. 2024, "AWQ: Activation-aware weight
    quantization for on-device LLM compression and acceleration".

    Attributes:
        inputs: float, or rounded with a scale for each token.
        batch_size: examples that run at once, at least 1.
    """

    batch_size: int = Field(default=32, ge=1)

    @field_validator("inputs")
    @classmethod
    def _by_token(cls, inputs: NumberFormat | None) -> NumberFormat | None:
        if inputs is not None and inputs.granularity != "token":
            raise ValueError("inputs are scaled here, so that a fixed range does not fit: choose token")
        return inputs


@handles(QuantizeAWQ, "torch")
def quantize_awq(model: Model, method: QuantizeAWQ, context: Context) -> Outcome:
    """Scale, put quantizers on the model and round; one change for every layer.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; quantized already.
    """
    begun = begin(model, method, context, method.batch_size)
    reference, layers = begun.placed.reference, begun.layers
    facts: dict[str, Facts] = {name: {"nearest": reason} for name, reason in begun.why.items()}
    moments: dict[str, NDArray[Any]] = {}
    for part in in_passes([layers[name] for name in begun.left]):
        grams = input_grams(context.backend, reference, part, begun.batches, context.seed)
        linear = {name: gram.mean[0] for name, gram in grams.items() if layers[name].kind == "linear"}
        moments |= linear
        facts |= {name: {"nearest": "it is no linear layer"} for name in grams if name not in linear}
    found = _scaled(model, reference, begun.probe, moments, context)
    for name, (gram, told) in found.items():
        facts[name] = told | _clipped(model, name, gram)
    changes = [
        change.model_copy(update={"detail": change.detail | facts.get(change.layer, {})})
        for change in begun.placed.changes
    ]
    return Outcome(model, changes)


def _scaled(
    model: Model, reference: Model, probe: Any, moments: dict[str, NDArray[Any]], context: Context
) -> dict[str, tuple[NDArray[Any], Facts]]:
    """Scale in place; return by layer the moments of its inputs after that, and facts."""
    import torch

    from penjing.backends.torch.quant.scaling import feeds, scale
    from penjing.backends.torch.tensors import to_inputs

    found: dict[str, tuple[NDArray[Any], Facts]] = {}
    for feed in feeds(reference, list(moments), to_inputs(reference, probe), context.seed, context.covers):
        gram, told = moments[feed.consumers[0]], Facts(scaled_by="", alpha=0.0)
        if feed.producer:
            context.say(Line.step(f"QuantizeAWQ: {', '.join(feed.consumers)}"))
            weights = [context.backend.read(model, name)["weight"] for name in feed.consumers]
            format = model.get_submodule(feed.consumers[0]).weight_quantizer.format
            factors, alpha = awq(np.concatenate(weights).astype(np.float64), gram, format)
            scale(model, feed, torch.from_numpy(factors))
            gram = gram / np.outer(factors, factors)
            told = Facts(scaled_by=feed.producer, alpha=alpha)
        found |= dict.fromkeys(feed.consumers, (gram, told))
    return found


def _clipped(model: Model, name: str, gram: NDArray[Any]) -> Facts:
    """Give a layer the scales of its weight as it is now; return the relative error of its outputs."""
    import torch

    from penjing.backends.torch.tensors import to_numpy

    module = model.get_submodule(name)
    weight, format = to_numpy(module.weight), module.weight_quantizer.format
    module.weight_quantizer = quantizer_of(format, importance_clipped(weight, np.diagonal(gram), format))
    with torch.no_grad():
        change = to_numpy(module.weight_quantizer(module.weight)).astype(np.float64) - weight
    whole = output_error(weight.astype(np.float64), gram)
    return {"error": output_error(change, gram) / whole if whole else 0.0}
