"""Round weights after scaling inputs so that those of large inputs err less."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from penjing.arrays.rounding.awq import awq, importance_clipped
from penjing.arrays.sparsity.gram import output_error
from penjing.calibration.inputs import input_grams, split_by_memory
from penjing.calibration.placing import make_quantizer
from penjing.calibration.rounding import Rounded
from penjing.calibration.rounding_in_order import prepare_rounding
from penjing.core.backend import Arrays
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.number_format import NumberFormat, number_format
from penjing.core.progress import Line
from penjing.core.registry import handles
from penjing.core.value import Model

Facts = dict[str, float | int | str]
Floats = NDArray[np.float64]


class QuantizeAWQ(Rounded):
    """Scale the inputs of linear layers, and the weights by the inverse, so that rounding changes least.

    The layer that makes the inputs, a normalization or a linear layer, takes the scales, so that the float
    model stays the same: they cost nothing when it runs. Lin et al. 2024, "AWQ: Activation-aware weight
    quantization for on-device LLM compression and acceleration".

    Attributes:
        weights: 4-bit integers in groups of 32 inputs by default.
        inputs: float, or rounded with a scale for each token.

    >>> QuantizeAWQ("int4 group 128", "int8 token").batch_size
    32
    """

    weights: NumberFormat = number_format("int4 group 32")
    inputs: NumberFormat | None = None

    @field_validator("inputs")
    @classmethod
    def _by_token(cls, inputs: NumberFormat | None) -> NumberFormat | None:
        if inputs is not None and inputs.granularity != "token":
            raise ValueError(
                "must have a scale for each token, since a fixed range does not fit inputs that are scaled; "
                "write int8 token, or None for float"
            )
        return inputs


@handles(QuantizeAWQ, "torch")
def quantize_awq(model: Model, method: QuantizeAWQ, context: Context) -> Outcome:
    """Scale, put quantizers on the model and round; one change for every layer.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; quantized already.
    """
    start = prepare_rounding(model, method, context)
    reference, layers = start.placed.reference, start.layers
    facts: dict[str, Facts] = {name: {"nearest": reason} for name, reason in start.why.items()}
    moments: dict[str, Floats] = {}
    for part in split_by_memory([layers[name] for name in start.left]):
        grams = input_grams(context.backend, reference, part, start.batches, context.seed)
        linear = {name: gram.mean[0] for name, gram in grams.items() if layers[name].kind == "linear"}
        moments |= linear
        facts |= {name: {"nearest": "it is no linear layer"} for name in grams if name not in linear}
    found = _scaled(model, reference, start.probe, moments, context)
    for name, (gram, scaling) in found.items():
        facts[name] = scaling | _clipped(model, name, gram)
    return Outcome(
        model, [change.with_detail(facts.get(change.layer, {})) for change in start.placed.changes]
    )


def _scaled(
    model: Model, reference: Model, probe: Arrays, moments: dict[str, Floats], context: Context
) -> dict[str, tuple[Floats, Facts]]:
    """Scale in place; return by layer the moments of its inputs after that, and facts."""
    import torch

    from penjing.backends.torch.quant.scaling import find_feeds, scale_inputs
    from penjing.backends.torch.tensors import to_inputs

    found: dict[str, tuple[Floats, Facts]] = {}
    for feed in find_feeds(
        reference, list(moments), to_inputs(reference, probe), context.seed, context.covers
    ):
        gram, scaling = moments[feed.consumers[0]], Facts(scaled_by="", alpha=0.0)
        if feed.producer:
            context.say(Line.step(f"QuantizeAWQ: {', '.join(feed.consumers)}"))
            weights = [context.backend.read(model, name)["weight"] for name in feed.consumers]
            format = model.get_submodule(feed.consumers[0]).weight_quantizer.format
            factors, alpha = awq(np.concatenate(weights).astype(np.float64), gram, format)
            scale_inputs(model, feed, torch.from_numpy(factors))
            gram = gram / np.outer(factors, factors)
            scaling = Facts(scaled_by=feed.producer, alpha=alpha)
        found |= dict.fromkeys(feed.consumers, (gram, scaling))
    return found


def _clipped(model: Model, name: str, gram: Floats) -> Facts:
    """Give a layer the scales of its weight as it is now; return the relative error of its outputs."""
    import torch

    from penjing.backends.torch.tensors import to_numpy

    module = model.get_submodule(name)
    weight, format = to_numpy(module.weight), module.weight_quantizer.format
    module.weight_quantizer = make_quantizer(format, importance_clipped(weight, np.diagonal(gram), format))
    with torch.no_grad():
        change = to_numpy(module.weight_quantizer(module.weight)).astype(np.float64) - weight
    whole = output_error(weight.astype(np.float64), gram)
    return {"error": output_error(change, gram) / whole if whole else 0.0}
