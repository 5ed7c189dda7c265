"""Learn rounding and clipping of weights by the sign of the gradient, block by block."""

from __future__ import annotations

from functools import partial

from pydantic import Field, field_validator

from penjing.calibration.inputs import calibration_batches, check_calibration_data
from penjing.calibration.learned_rounding import LearningData, learn_rounding_by_blocks
from penjing.calibration.rounding import Rounded
from penjing.calibration.settings import BatchSize
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.number_format import NumberFormat, number_format
from penjing.core.registry import handles
from penjing.core.value import Model


class QuantizeAutoRound(Rounded):
    """Learn an offset of each weight before rounding, and the ends of each range, without labels.

    Block by block in the order of the network: offsets within half a step and the ends of ranges move against
    the sign of the gradient of the block's squared error, on inputs that the quantized blocks before it give.
    Cheng et al. 2024, "Optimize weight rounding via signed gradient descent for the quantization of LLMs"
    ("SignRound", "AutoRound").

    Attributes:
        weights: integers; in 4 bits and groups of 32 inputs by default.
        inputs: float by default.
        examples: training examples that are learned from; their activations are kept in memory, one block
            at a time.
        batch_size: examples in each step.
        steps: of learning for each block.
        block: most quantized layers in a block.

    >>> QuantizeAutoRound("int3 group 64", steps=400).examples
    256
    """

    weights: NumberFormat = number_format("int4 group 32")
    inputs: NumberFormat | None = None
    batch_size: BatchSize = 8
    steps: int = Field(default=200, ge=1, le=1_000_000)
    block: int = Field(default=8, ge=1)

    @field_validator("weights")
    @classmethod
    def _integers(cls, weights: NumberFormat) -> NumberFormat:
        if weights.kind != "integer":
            raise ValueError("must be integers, for which rounding is learned; write int4 or uint3 group 32")
        return weights


@handles(QuantizeAutoRound, "torch")
def quantize_autoround(model: Model, method: QuantizeAutoRound, context: Context) -> Outcome:
    """Put quantizers on the model and learn their rounding; one change for every layer.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; quantized already.
    """
    from penjing.backends.torch.quant.sign_rounding import SignLearning, learn_by_signs

    batches = calibration_batches(context, method.examples, method.examples)
    check_calibration_data(batches)
    learning = SignLearning(method.steps, method.batch_size, context.seed)
    data = LearningData(batches[0][0], method.examples, method.block)
    return learn_rounding_by_blocks(model, method, context, partial(learn_by_signs, learning=learning), data)
