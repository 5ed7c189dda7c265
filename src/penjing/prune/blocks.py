"""Remove whole blocks, so that the network gets shallower."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from penjing.arrays.structure.removal import Judge, additive_choice, joint_choice
from penjing.calibration.inputs import calibration_batches
from penjing.core.backend import Arrays
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.backends.torch.cut.shortened import Shortened
    from penjing.backends.torch.structure.blocks import Blocks


class RemoveBlocks(Method):
    """Remove residual blocks or transformer layers whose input and output have the same shape.

    What is left runs as if the block were not there. Exactly one of `count` and `ratio` is given.

    Attributes:
        count: how many blocks go, at least 1 and fewer than there are.
        ratio: the share of the blocks that may go which goes, rounded to a whole number; between 0 and 1.
        score: `joint`: sets of blocks are measured as a whole, by how far the outputs of the really shortened
            network, its BatchNorm statistics re-estimated, are from the original's on unlabelled examples;
            `influence`: the blocks of least Block Influence, which ignores how removals interact (Men et al.
            2024).
        examples: training inputs that networks are measured on, at least 2.
        batch_size: examples that run at once, at least 2.
        evaluations: networks that `joint` may measure, at least 1; it needs one more than there are blocks.

    >>> RemoveBlocks(count=2, score="influence").examples
    256
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    count: int | None = Field(default=None, ge=1)
    ratio: float | None = Field(default=None, gt=0, lt=1)
    score: Literal["joint", "influence"] = "joint"
    examples: int = Field(default=256, ge=2, le=1_000_000)
    batch_size: int = Field(default=128, ge=2)
    evaluations: int = Field(default=200, ge=1)

    def __init__(self, ratio: float | None = None, **fields: Any) -> None:
        super().__init__(**{"ratio": ratio, **fields})

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.count is None) == (self.ratio is None):
            given = "neither" if self.count is None else "both"
            raise ValueError(
                f"exactly one of count and ratio must be given, got {given}; write for example count=2"
            )
        return self


@handles(RemoveBlocks, "torch")
def remove_blocks(model: Model, method: RemoveBlocks, context: Context) -> Outcome:
    """Find the blocks, choose a set, take it out; one change for every block and every neighbour of one."""
    from penjing.backends.torch.structure.blocks import find_blocks, remove_blocks

    example = context.task.valid.example()
    blocks = find_blocks(model, example)
    covered = [name for name in blocks.found if context.covers(name)]
    if not covered:
        return Outcome(model, _left_out(blocks, context))
    count = _amount(method, len(covered), len(blocks.found))
    shortened = _shortened(model, blocks, method, context)
    influences = shortened.influences()
    chosen, divergences = _choose(covered, count, method, shortened, influences)
    result = remove_blocks(model, blocks, chosen, example)
    together = shortened.divergence(chosen)
    context.notes["blocks_removed"] = {"names": chosen, "divergence": together}
    changes = Changes(method)
    for name in covered:
        detail = {"influence": round(influences[name], 6)}
        if name in divergences:
            detail["divergence_alone"] = round(divergences[name], 6)
        if name in chosen:
            changes.done(name, **detail, divergence_together=round(together, 6))
        else:
            changes.skip(name, "another set of blocks diverges less", **detail)
    return Outcome(result, [*changes, *_left_out(blocks, context)])


def _amount(method: RemoveBlocks, covered: int, blocks: int) -> int:
    """Return how many blocks go.

    Raises:
        Refused: none, more than the plan covers, or all of the model's; too few evaluations for them.
    """
    if method.count is not None:
        count, place, value = method.count, "RemoveBlocks.count", str(method.count)
    else:
        assert method.ratio is not None
        count, place = math.floor(method.ratio * covered + 0.5), "RemoveBlocks.ratio"
        value = f"{method.ratio:g} of {covered} blocks: {count}"
    most = min(covered, blocks - 1)
    if not 1 <= count <= most:
        raise Refused(
            "must remove at least one block and leave at least one",
            value=value,
            place=place,
            fix=f"remove from 1 to {most} of the {covered} blocks that the plan covers"
            if most
            else "the model has one block only: leave the step out",
        )
    if method.score == "joint" and method.evaluations <= covered:
        raise Refused(
            f"must be more than the {covered} blocks that the plan covers",
            value=method.evaluations,
            place="RemoveBlocks.evaluations",
            fix=f"allow {covered + 1} or more, or use score='influence'",
        )
    return count


def _shortened(model: Model, blocks: Blocks, method: RemoveBlocks, context: Context) -> Shortened:
    """Read the examples and make what measures shortened networks.

    Raises:
        Refused: no batch of at least 2 examples.
    """
    from penjing.backends.torch.cut.shortened import Shortened, outputs_are_logits

    walk = calibration_batches(context, method.examples, method.batch_size)
    batches: list[Arrays] = [inputs for inputs, targets in walk if len(targets) > 1]
    if not batches:
        raise Refused(
            "must have at least 2 examples to measure networks on",
            place="task.train",
            value=len(context.task.train),
            fix="give more training data",
        )
    output = context.backend.run(model, context.task.valid.example())
    return Shortened(model, blocks, batches, context.original, outputs_are_logits(context.task.loss, output))


def _choose(
    covered: Sequence[str],
    count: int,
    method: RemoveBlocks,
    shortened: Shortened,
    influences: Mapping[str, float],
) -> tuple[list[str], dict[str, float]]:
    """Return the blocks that go, in network order, and the divergence of every block measured alone."""
    if method.score == "influence":
        chosen = additive_choice({i: influences[name] for i, name in enumerate(covered)}, count)
        return [covered[i] for i in chosen], {}
    judge = Judge(lambda numbers: shortened.divergence([covered[i] for i in numbers]), method.evaluations)
    for i in range(len(covered)):
        judge((i,))
    chosen = joint_choice(range(len(covered)), count, judge)
    return [covered[i] for i in chosen], {name: judge((i,)) for i, name in enumerate(covered)}


def _left_out(blocks: Blocks, context: Context) -> Changes:
    """Say of every neighbour of a block that the plan covers why it stays."""
    changes = Changes("RemoveBlocks")
    for name, reason in blocks.kept.items():
        if context.covers(name):
            changes.skip(name, reason)
    return changes
