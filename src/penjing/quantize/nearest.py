"""Round to nearest: weights and inputs on formats, nothing learned."""

from __future__ import annotations

from penjing.calibration.placing import place_quantizers
from penjing.calibration.rounding import Rounded
from penjing.core.context import Context
from penjing.core.method import Model, Outcome, handles


class QuantizeNearest(Rounded):
    """Round weights and inputs of convolutions and linear layers to the nearest values of their formats.

    Scales of weights are those that err least in L2 for each channel (or group); ranges of inputs come from
    calibration. BatchNorm is folded first. The model computes with rounded values in float: quality is that
    of the integer model, speed is not. The baseline of every other method of rounding (Nagel et al. 2021, "A
    White Paper on Neural Network Quantization").
    """


@handles(QuantizeNearest, "torch")
def quantize_nearest(model: Model, method: QuantizeNearest, context: Context) -> Outcome:
    """Put quantizers on the model; one change for every convolution and linear layer.

    Raises:
        Refused: no data, quantized already, or inputs that are NaN, infinite or constant.
    """
    return Outcome(model, place_quantizers(model, method, context).changes)
