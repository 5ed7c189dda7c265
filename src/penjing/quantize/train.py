"""Train a quantized model: weights and scales, towards the original."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model
from penjing.train.method import TrainingMethod
from penjing.train.outcome import train_by_method
from penjing.train.teacher import DistillationConfig, prepare_distillation


class TrainQuantized(TrainingMethod):
    """Train weights and scales of a quantized model with rounding in the forward pass.

    Follows a method that put the model on formats, of any kind. Gradients pass straight through the rounding;
    scales are learned step sizes (Esser et al. 2020, "LSQ"; Bhalgat et al. 2020, "LSQ+") where a format lets
    them have any value: not in mx formats and nvfp4, and not for tokens. The teacher is the model as
    it was before the plan (Hinton's loss on standardized logits, as in `Distill`).

    Attributes:
        temperature: softens both distributions.
        alpha: share of the teacher's loss in [0, 1]; at 1 labels are not used.

    >>> TrainQuantized(epochs=2).alpha
    0.9
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    temperature: float = Field(default=2.0, gt=0, le=1000)
    alpha: float = Field(default=0.9, ge=0, le=1)


@handles(TrainQuantized, "torch")
def train_quantized(model: Model, method: TrainQuantized, context: Context) -> Outcome:
    """Train; refuses as `penjing.train.loop.fit` does, and a model without quantizers."""
    from penjing.backends.torch.quantizers import quantizers_of

    if not quantizers_of(model):
        raise Refused(
            "needs a quantized model",
            value="one whose layers are all float",
            place="TrainQuantized",
            fix="put QuantizeNearest or QuantizeReconstruct in front of it",
        )
    quantizers = [quantizer for quantizer in quantizers_of(model) if quantizer.learnable]
    for quantizer in quantizers:
        quantizer.learned()
    try:
        config = DistillationConfig.for_strategy(
            method.strategy, temperature=method.temperature, alpha=method.alpha
        )
        with prepare_distillation(context, config) as (split, objective):
            return train_by_method(model, method, context, objective, split)
    finally:
        for quantizer in quantizers:
            quantizer.learned(False)
