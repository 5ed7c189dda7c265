"""Make weights of a whole network zero, all others corrected, by gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.sparsity.ramp import round_sparsity
from penjing.arrays.sparsity.second_order import Quadratic, best_sparse
from penjing.arrays.sparsity.weights import weight_masks
from penjing.calibration.candidates import Candidate, describe_mask, find_candidates, keep_masks
from penjing.calibration.inputs import calibration_batches, why_not_called
from penjing.calibration.settings import BatchSize, Sparse
from penjing.core.context import Context
from penjing.core.errors import Exit, Refused
from penjing.core.method import Outcome
from penjing.core.progress import Line
from penjing.core.registry import handles
from penjing.core.task import Batch
from penjing.core.value import Model

if TYPE_CHECKING:
    from torch import nn

MEMORY_SHARE = 0.5
"""Share of the free memory that gradients may take; solving copies a part of them."""


class PruneSecondOrder(Sparse):
    """Remove weights over all layers together and correct what stays, so that the outputs stay.

    The network is taken as linear in its weights around where they are, by the gradient of a random
    direction of the outputs for every example; on that, least squares with a bound on the number of weights
    (Benbaki et al. 2023, "Fast as CHITA"; after Singh & Alistarh 2020, "WoodFisher"). In several stages the
    gradients are taken anew and errors of the stages before are corrected too. Labels are not used.

    Attributes:
        examples: of the training data, at least 8; each takes 4 bytes for each weight.
        batch_size: examples that run at once, at least 1.
        stages: of rising sparsity, at least 1; each keeps the same share of what the one before it kept.
        ridge: pull back to the weights, relative to the mean square of the gradients.
        iterations: of thresholding in each stage, from 0; with 0 the smallest weights go.
        floor: share of its weights that every layer keeps at least, from 0 to below 1.

    >>> PruneSecondOrder(0.7, examples=256).stages
    8
    """

    examples: int = Field(default=512, ge=8, le=1_000_000)
    batch_size: BatchSize = 64
    stages: int = Field(default=8, ge=1, le=1000)
    ridge: float = Field(default=0.01, gt=0, le=1e6)
    iterations: int = Field(default=2, ge=0, le=1000)
    floor: float = Field(default=0.02, ge=0, lt=1)

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the same share of zeros."""
        return False


@handles(PruneSecondOrder, "torch")
def prune_second_order(model: Model, method: PruneSecondOrder, context: Context) -> Outcome:
    """Prune a torch module; one change for every layer with a weight matrix.

    Raises:
        Refused: the gradients do not fit into memory; there is no training data.
    """
    found, changes = find_candidates(model, method, context)
    batches = calibration_batches(context, method.examples, method.batch_size)
    reasons = _reasons(model, found, context, batches)
    layers = [c for c in found if c.name not in reasons]
    for name, reason in reasons.items():
        changes.skip(name, reason)
    if not layers:
        return Outcome(model, changes)
    net = _Net(model, method, context, tuple(layers), tuple(batches))
    net.check_memory()
    stages = 1 if method.zeros.group else method.stages
    for stage in range(1, stages + 1):
        share = round_sparsity(stage, stages, method.share)
        context.say(Line.step(f"PruneSecondOrder: stage {stage} of {stages}, {share:.1%} zeros"))
        masks = net.prune(share, stage)
    for name, mask in masks.items():
        changes.done(name, **describe_mask(mask))
    return Outcome(model, changes)


def _reasons(
    model: Model, found: Sequence[Candidate], context: Context, batches: Sequence[Batch]
) -> dict[str, str]:
    from penjing.backends.torch.curvature.per_sample_gradients import explain_unsupported

    reasons = {c.name: explain_unsupported(model.get_submodule(c.name)) for c in found}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    left = [c.name for c in found if c.name not in reasons]
    return reasons | why_not_called(context.backend, model, left, tuple(x[:1] for x in batches[0][0]))


@dataclass(frozen=True)
class _Net:
    """A network seen as one vector of the weights of its layers, in their order."""

    model: nn.Module
    method: PruneSecondOrder
    context: Context
    layers: tuple[Candidate, ...]
    batches: tuple[Batch, ...]

    @property
    def size(self) -> int:
        return sum(c.weight.size for c in self.layers)

    def check_memory(self) -> None:
        """Refuse where the gradients do not fit."""
        examples = sum(len(targets) for _, targets in self.batches)
        needed, free = 4 * examples * self.size, psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            raise Refused(
                f"must be so few that gradients fit into half of the {free / 2**30:.1f} GiB of free memory",
                value=f"{examples}, which take {needed / 2**30:.1f} GiB for {self.size} weights",
                place="PruneSecondOrder.examples",
                fix=f"ask for {max(8, int(MEMORY_SHARE * free / (4 * self.size)))}, or prune fewer layers "
                "with only(...)",
                code=Exit.ENVIRONMENT,
            )

    def prune(self, share: float, stage: int) -> dict[str, NDArray[np.bool_]]:
        """Take gradients, solve, and write weights and masks."""
        read = self.context.backend.read
        weights = np.concatenate([read(self.model, c.name)["weight"].ravel() for c in self.layers])
        rows, errors = self._rows(stage)
        mean = float(np.mean([np.square(row, dtype=np.float64).mean() for row in rows]))
        quadratic = Quadratic(rows, errors, self.method.ridge * (mean or 1.0))

        def choose(vector: NDArray[np.float32]) -> NDArray[np.bool_]:
            return np.concatenate([mask.ravel() for mask in self._masks(vector, share).values()])

        best = best_sparse(quadratic, weights.astype(np.float32), choose, self.method.iterations)
        masks = self._masks(best, share)
        for candidate, part in zip(self.layers, self._split(best), strict=True):
            kept = np.where(masks[candidate.name], part, 0).astype(candidate.weight.dtype)
            self.context.backend.write(self.model, candidate.name, {"weight": kept})
        keep_masks(self.model, self.context, masks)
        return masks

    def _masks(self, vector: NDArray[np.float32], share: float) -> dict[str, NDArray[np.bool_]]:
        parts = self._split(vector)
        scores = {c.name: np.square(p.astype(np.float64)) for c, p in zip(self.layers, parts, strict=True)}
        return weight_masks(scores, share, self.method.zeros, "global", self.method.floor)

    def _split(self, vector: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        ends = np.cumsum([c.weight.size for c in self.layers])[:-1]
        pairs = zip(np.split(vector, ends), self.layers, strict=True)
        return (part.reshape(c.weight.shape) for part, c in pairs)

    def _rows(self, stage: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return gradients `[examples, weights]` of directions of the outputs, and errors along these."""
        from penjing.backends.torch.curvature.output_slopes import directed_gradients

        examples = sum(len(targets) for _, targets in self.batches)
        rows, errors = np.empty((examples, self.size), np.float32), np.empty(examples, np.float32)
        modules = {c.name: self.model.get_submodule(c.name) for c in self.layers}
        centred, start = self.context.task.loss == "cross_entropy", 0
        for number, (inputs, targets) in enumerate(self.batches):
            part = slice(start, start + len(targets))
            wanted = self.context.backend.run(self.context.original, inputs)
            seed = (self.context.seed, stage, number)
            rows[part], errors[part] = directed_gradients(
                self.model, modules, inputs, wanted, (centred, seed)
            )
            start = part.stop
        return rows, errors
