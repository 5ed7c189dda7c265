"""Rounding learned block by block, with a change for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penjing.calibration.placing import place_quantizers
from penjing.calibration.rounding import Rounded
from penjing.core.backend import Arrays
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.backends.torch.quant.reconstruct import Learn


@dataclass(frozen=True)
class LearningData:
    """What rounding is learned from.

    Attributes:
        inputs: of the model.
        range_examples: training examples that the ranges of inputs of layers are taken from.
        block: most quantized layers that learn together.
    """

    inputs: Arrays
    range_examples: int
    block: int


def learn_rounding_by_blocks(
    model: Model, method: Rounded, context: Context, learn: Learn, data: LearningData
) -> Outcome:
    """Put quantizers on a model and learn how each block rounds; one change for every layer.

    Args:
        model: changed in place.
        method: formats and data.
        context: of the application.
        learn: how one block learns.
        data: what is learned from.

    Raises:
        Refused: as `place_quantizers`.
    """
    from penjing.backends.torch.quant.reconstruct import reconstruct

    placed = place_quantizers(model, method, context, data.range_examples)
    found = reconstruct(model, placed.reference, data.inputs, learn, data.block, context.say)
    facts = {layer: block for block in found for layer in block.layers}
    changes = []
    for change in placed.changes:
        block = facts.get(change.layer)
        more: dict[str, float | int | str] = {}
        if block is not None and change.done:
            more = {"block": block.block, "error_before": block.before, "error_after": block.after}
        elif change.done:
            more = {"nearest": "the model calls it other than once, or not with one tensor"}
        changes.append(change.with_detail(more))
    return Outcome(model, changes)
