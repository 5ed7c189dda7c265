"""Learn how weights are rounded, block by block."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from penjing.calibration.inputs import no_examples
from penjing.calibration.learned_rounding import LearningData, learn_rounding_by_blocks
from penjing.calibration.rounding import Rounded
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model

RANGE_EXAMPLES = 256
"""Ranges of inputs are taken from at most so many; learning moves them afterwards."""


class QuantizeReconstruct(Rounded):
    """Round each weight up or down as it serves the block that it is in, without labels.

    Block by block in the order of the network: for every weight a variable says whether it goes up or down
    (Nagel et al. 2020, "AdaRound"); together with the scales of inputs it learns to make the block give what
    the float block gave (Li et al. 2021, "BRECQ"), on inputs that the quantized blocks before it give, mixed
    with those of the float model, and with some input values left unrounded at random (Wei et al. 2022,
    "QDrop").

    Attributes:
        examples: training examples that are learned from, at least 32; their activations are kept in memory,
            one block at a time. Ranges of inputs start from the first 256 of them.
        batch_size: examples in each step.
        steps: of learning for each block.
        block: most quantized layers in a block.
        drop: probability of leaving an input value as it is while learning, in [0, 1).

    >>> QuantizeReconstruct("int4 channel", "uint8", steps=2000).examples
    1024
    """

    examples: int = Field(default=1024, ge=32, le=1_000_000)
    steps: int = Field(default=1000, ge=1, le=1_000_000)
    block: int = Field(default=4, ge=1)
    drop: float = Field(default=0.5, ge=0, lt=1)


@handles(QuantizeReconstruct, "torch")
def quantize_reconstruct(model: Model, method: QuantizeReconstruct, context: Context) -> Outcome:
    """Put quantizers on the model and learn their rounding; one change for every layer.

    Raises:
        Refused: fewer than 32 training examples, quantized already, or inputs that are NaN or infinite.
    """
    from penjing.backends.torch.quant.reconstruct import Learning, learn_up_or_down

    learning = Learning(method.steps, method.batch_size, drop=method.drop, seed=context.seed)
    if not len(context.task.train):
        raise no_examples()
    arrays = next(context.task.train.batches(method.examples, context.seed))[0]
    if len(arrays[0]) < 32:
        raise Refused(
            "must have at least 32 examples to learn rounding from",
            value=len(arrays[0]),
            place="task.train",
            fix="give more training data, or use QuantizeNearest",
        )
    learn = partial(learn_up_or_down, learning=learning, learned=set())
    data = LearningData(arrays, min(method.examples, RANGE_EXAMPLES), method.block)
    return learn_rounding_by_blocks(model, method, context, learn, data)
