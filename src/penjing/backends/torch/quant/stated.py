"""What the quantizers of a network say of its layers, as arrays."""

from __future__ import annotations

import numpy as np
from torch import nn

from penjing.arrays.formats.coding import encode
from penjing.arrays.formats.parameters import Parameters, code_type
from penjing.arrays.formats.stated import LayerFormats
from penjing.backends.torch.quantizers import Quantizer, quantized_layers
from penjing.backends.torch.tensors import to_numpy


def layer_formats(model: nn.Module) -> dict[str, LayerFormats]:
    """Return by name what the quantizers of a model say, with the codes of its weights."""
    found = {}
    for name, layer in quantized_layers(model):
        weight, inputs = layer.weight_quantizer, layer.input_quantizer
        if weight is None:
            continue
        found[name] = LayerFormats(
            encode(to_numpy(layer.weight), weight.format, *_stated(weight)),
            None if inputs is None else inputs.format,
            None if inputs is None or inputs.format.granularity == "token" else _stated(inputs),
        )
    return found


def _stated(quantizer: Quantizer) -> Parameters:
    """Return scales and zero points as `encode` takes them."""
    zero, whole = quantizer.zero_point, quantizer.tensor_scale
    points = None if zero is None else to_numpy(zero).astype(code_type(quantizer.format, np))
    return Parameters(to_numpy(quantizer.scale), points, None if whole is None else to_numpy(whole))
