"""What a layer's numbers are, as a method has stated it: for those that make integers of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.arrays.formats.coding import Encoded
from penjing.arrays.formats.parameters import Parameters
from penjing.arrays.quantization import Grid
from penjing.core.number_format import NumberFormat


@dataclass(frozen=True)
class LayerFormats:
    """The formats of one layer, with the codes of its weight.

    Attributes:
        weights: NumPy arrays; the weight as `[out, in, *kernel]`.
        inputs: of what the layer takes; None where that stays float.
        input_parameters: of `inputs`, NumPy arrays; None where tokens get theirs when the model runs.
    """

    weights: Encoded
    inputs: NumberFormat | None = None
    input_parameters: Parameters | None = None


def input_grid(formats: LayerFormats) -> Grid | None:
    """Return the unsigned 8-bit grid with the very values of a layer's input format, or None.

    Signed codes lie on it 128 higher.
    """
    inputs, found = formats.inputs, formats.input_parameters
    if inputs is None or found is None or inputs.kind != "integer" or inputs.bits != 8:
        return None
    if inputs.granularity != "tensor" or inputs.narrow:
        return None
    zero = 0 if found.zero_points is None else int(found.zero_points)
    return Grid(np.float32(found.scales), zero - inputs.lowest)


def kernel_lacks(formats: LayerFormats) -> str:
    """Say what keeps a layer from 8-bit integer kernels with one grid for its input; empty for nothing."""
    weights = formats.weights.format
    if weights.kind != "integer" or not weights.symmetric or not weights.signed or weights.bits > 8:
        return f"the kernel's weights are signed symmetric integers of at most 8 bits, not {weights}"
    if weights.granularity not in ("tensor", "channel"):
        return f"the kernel's weights have a scale for each channel, not {weights}"
    if formats.inputs is None:
        return "its input stays float, and so it does: WeightOnly stores its weights"
    if input_grid(formats) is None:
        return f"the kernel takes 8-bit inputs on one grid, not {formats.inputs}"
    return ""


SMALLEST_BLOCK = 16
CHANNEL_BLOCK = 128
"""Block that the scale of a whole channel is repeated for."""


def is_block(group: int) -> bool:
    """Tell whether ONNX Runtime's block-quantized operators know a length of groups."""
    return group >= SMALLEST_BLOCK and group & (group - 1) == 0


def container(format: NumberFormat) -> int:
    """Return the bits that codes are stored in: 4 or 8."""
    return 4 if format.bits <= 4 else 8


def packing_lacks(formats: LayerFormats) -> str:
    """Say what keeps a layer's weight from being packed in blocks; empty for nothing."""
    weights = formats.weights.format
    if formats.inputs is not None:
        return f"packed weights multiply float inputs, not {formats.inputs}: Int8Static makes them integers"
    if weights.kind != "integer" or weights.bits > 8:
        return f"packed weights are integers of at most 8 bits, not {weights}"
    if weights.granularity == "group" and not is_block(weights.group):
        return f"packed weights have groups of 16, 32, 64, ..., not of {weights.group}"
    if weights.signed != weights.symmetric:
        return f"packed codes are signed and symmetric or unsigned with a zero point, not {weights}"
    return ""


def in_groups(encoded: Encoded) -> Encoded:
    """Return the same values with a scale for every group: that of its channel, or the tensor's."""
    format = encoded.format
    if format.granularity == "group":
        return encoded
    grouped = format.model_copy(update={"granularity": "group", "group": CHANNEL_BLOCK})
    shape = grouped.scale_shape(encoded.shape)

    def spread(values: Any) -> Any:
        each = np.broadcast_to(np.reshape(values, (-1, 1)), (shape[0], 1))
        return np.ascontiguousarray(np.broadcast_to(each, shape))

    zero = None if encoded.zero_points is None else spread(encoded.zero_points)
    return Encoded(encoded.codes, spread(encoded.scales), zero, grouped)
