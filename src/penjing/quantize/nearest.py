"""Round to nearest: weights and inputs on formats, nothing learned."""

from __future__ import annotations

from penjing.calibration.placing import place_quantizers
from penjing.calibration.rounding import Rounded
from penjing.calibration.synthetic import CalibrationData, with_synthetic_calibration
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class QuantizeNearest(Rounded):
    """Round weights and inputs of convolutions and linear layers to the nearest values of their formats.

    Scales of weights are those that err least in L2 for each channel (or group); ranges of inputs come from
    calibration. BatchNorm is folded first. The model computes with rounded values in float: quality is that
    of the integer model, speed is not. The baseline of every other method of rounding (Nagel et al. 2021, "A
    White Paper on Neural Network Quantization").

    Attributes:
        data: what ranges of inputs are taken from: training inputs, or, with `synthetic`, at most 64 inputs
            made from what BatchNorm layers remember of their data (Cai et al. 2020, "ZeroQ").

    >>> QuantizeNearest("int4 channel", None).inputs is None
    True
    """

    data: CalibrationData = "train"


@handles(QuantizeNearest, "torch")
def quantize_nearest(model: Model, method: QuantizeNearest, context: Context) -> Outcome:
    """Put quantizers on the model; one change for every convolution and linear layer.

    Raises:
        Refused: no data, quantized already, or inputs that are NaN, infinite or constant; inputs are to be
            made for a model without BatchNorm.
    """
    if method.data == "synthetic":
        context = with_synthetic_calibration(model, context, method.examples)
    return Outcome(model, place_quantizers(model, method, context, method.examples).changes)
