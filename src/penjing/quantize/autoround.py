"""Learn rounding and clipping of weights by the sign of the gradient, block by block."""

from __future__ import annotations

from functools import partial

from pydantic import Field, field_validator

from penjing.calibration.inputs import calibration_batches, refuse_dull
from penjing.calibration.learned_rounding import learned_by_blocks
from penjing.calibration.rounding import RoundedWeights
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.number_format import NumberFormat
from penjing.core.registry import handles
from penjing.core.value import Model


class QuantizeAutoRound(RoundedWeights):
    """Learn an offset of each weight before rounding, and the ends of each range, without labels.

    Block by block in the order of the network: offsets within half a step and the ends of ranges move against
    the sign of the gradient of the block's squared error, on inputs that the quantized blocks before it give.
    Cheng et al. 2024, "Optimize weight rounding via signed gradient descent for the quantization of LLMs"
    ("SignRound", "AutoRound").

    Attributes:
        weights: integers.
        calibration: training examples that are learned from; their activations are kept in memory, one block
            at a time.
        steps: of learning for each block.
        size: examples in each.
        block: most quantized layers in a block.
    """

    steps: int = Field(default=200, ge=1, le=1_000_000)
    size: int = Field(default=8, ge=1)
    block: int = Field(default=8, ge=1)

    @field_validator("weights")
    @classmethod
    def _integers(cls, weights: NumberFormat) -> NumberFormat:
        if weights.kind != "integer":
            raise ValueError("rounding is learned for integers: int4, uint3 group 32, ...")
        return weights


@handles(QuantizeAutoRound, "torch")
def quantize_autoround(model: Model, method: QuantizeAutoRound, context: Context) -> Outcome:
    """Put quantizers on the model and learn their rounding; one change for every layer.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; quantized already.
    """
    from penjing.backends.torch.quant.sign_rounding import SignLearning, learn_by_signs

    batches = calibration_batches(context, method.calibration, method.calibration)
    refuse_dull(batches)
    learn = partial(learn_by_signs, learning=SignLearning(method.steps, method.size, context.seed))
    return learned_by_blocks(model, method, context, learn, batches[0][0], method.block)
