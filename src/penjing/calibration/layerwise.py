"""Methods that prune one layer at a time so that its outputs stay near, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.sparsity.gram import Gram, compensated, damped, output_error
from penjing.arrays.sparsity.obc import refit
from penjing.arrays.sparsity.patterns import Pattern
from penjing.calibration.candidates import (
    Candidate,
    describe_mask,
    find_candidates,
    from_matrices,
    keep_masks,
    to_matrices,
)
from penjing.calibration.inputs import (
    calibration_batches,
    execution_levels,
    input_grams,
    split_by_memory,
    why_not_called,
    why_unobservable,
)
from penjing.calibration.settings import Sparse
from penjing.core.context import Context
from penjing.core.method import Changes, Outcome, name_of
from penjing.core.progress import Line
from penjing.core.task import Batch
from penjing.core.value import Model

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

Solve = Callable[[Floats, Floats, float, Pattern], tuple[Floats, Mask]]
"""From a weight `[rows, columns]`, the mean of x xᵀ, the share of zeros and the pattern to the new weight and
its mask."""

PROBE = 2
"""Examples that find the order of the layers."""


@dataclass(frozen=True)
class Inputs:
    """On which inputs layers are pruned.

    Attributes:
        examples: of the training data.
        batch_size: examples that run at once.
        sequential: each layer sees what the layers pruned before it give; else what the dense model gives.
        compensate: aim at the outputs of the dense model on its own inputs.
    """

    examples: int
    batch_size: int
    sequential: bool
    compensate: bool = False


@dataclass(frozen=True)
class Work:
    """What is to be pruned: layers, data and the order.

    Attributes:
        model: changed in place.
        layers: by name.
        batches: calibration data.
        levels: names of layers that one pass over the data serves, in the order of the data.
        changes: of layers that are left out; those of the others are added.
        dense: a copy of the model as it was, where its inputs are aimed at.
        observed: the model whose inputs count: the one that changes, or, not in sequence, the dense one.
    """

    model: Model
    method: Sparse
    context: Context
    layers: Mapping[str, Candidate]
    batches: Sequence[Batch]
    levels: Sequence[Sequence[str]]
    changes: Changes
    dense: Model | None
    observed: Model

    def grams(self, names: Sequence[str]) -> dict[str, Gram]:
        """Return the second moments of the inputs of some layers, in the model as it is now."""
        layers, context = [self.layers[name].layer for name in names], self.context
        return input_grams(context.backend, self.observed, layers, self.batches, context.seed, self.dense)

    def split_by_memory(self, names: Sequence[str]) -> list[list[str]]:
        """Split names so that the moments of each part fit into memory together."""
        parts = split_by_memory([self.layers[name].layer for name in names])
        return [[layer.name for layer in part] for part in parts]


def prepare(model: Model, method: Sparse, context: Context, inputs: Inputs) -> Work:
    """Find layers, data and order.

    Raises:
        Refused: there is no training data.
    """
    found, changes = find_candidates(model, method, context)
    batches = calibration_batches(context, inputs.examples, inputs.batch_size)
    probe = tuple(x[:PROBE] for x in batches[0][0])
    reasons = {c.name: why for c in found if (why := why_unobservable(c.layer))}
    named = [c.name for c in found if c.name not in reasons]
    reasons |= why_not_called(context.backend, model, named, probe)
    left = [name for name in named if name not in reasons]
    levels = [left]
    if inputs.sequential:
        levels = execution_levels(context.backend, model, left, probe, context.seed)
    layers = {c.name: c for c in found if c.name in left}
    for name, reason in reasons.items():
        changes.skip(name, reason)
    dense = context.backend.copy(model) if inputs.compensate else None
    observed = model if inputs.sequential else context.backend.copy(model)
    return Work(model, method, context, layers, batches, levels, changes, dense, observed)


def prune_layers(
    work: Work, solve: Solve, shares: Mapping[str, float] | None = None, updates: bool = True
) -> Outcome:
    """Prune each layer on the inputs that it then has; one change for each.

    Args:
        work: from `prepare`.
        solve: the method's mathematics.
        shares: share of zeros by layer; None: the method's for all.
        updates: whether weights that stay change; their moments are then damped, and a layer with fewer
            observations than inputs is skipped, since it would learn them by heart.
    """
    exact = _on_damped(solve) if updates else solve

    def solver(name: str, gram: Gram) -> tuple[str, Solve, float]:
        share = work.method.share if shares is None else shares[name]
        return _why_whole(work.layers[name], gram, share, updates), exact, share

    return _prune_in_order(work, solver)


def refit_layers(work: Work, masks: Mapping[str, Mask]) -> Outcome:
    """Give each layer the weights on its mask whose outputs, on the inputs that it then has, err least.

    Args:
        work: from `prepare`.
        masks: by layer, in the shape of the weight; a layer without one is skipped.
    """

    def solver(name: str, gram: Gram) -> tuple[str, Solve, float]:
        candidate = work.layers[name]
        mask = masks.get(name, np.ones(candidate.weight.shape, bool))
        order = work.method.zeros.column_order(mask.shape)
        parts = iter(mask.reshape(candidate.groups, -1, candidate.columns)[:, :, order])

        def refitted(weight: Floats, moments: Floats, share: float, pattern: Pattern) -> tuple[Floats, Mask]:
            part = next(parts)
            return refit(weight, damped(moments), part), part

        share = 1 - float(mask.mean())
        return why_too_few(candidate, gram) or _why_whole(candidate, gram, share, True), refitted, share

    return _prune_in_order(work, solver)


def _prune_in_order(work: Work, solver: Callable[[str, Gram], tuple[str, Solve, float]]) -> Outcome:
    """Prune layers in the order of the data; `solver` gives why not, or how and how much."""
    method, context, changes = work.method, work.context, work.changes
    masks: dict[str, Mask] = {}
    passes = [part for level in work.levels for part in work.split_by_memory(level)]
    for number, names in enumerate(passes, 1):
        context.say(Line.step(f"{name_of(method)}: {', '.join(names)} ({number} of {len(passes)})"))
        for name, gram in work.grams(names).items():
            reason, solve, share = solver(name, gram)
            if reason:
                changes.skip(name, reason)
                continue
            weight, masks[name], error = prune_layer(work.layers[name], gram, solve, share, method.zeros)
            context.backend.write(work.model, name, {"weight": weight})
            changes.done(name, **describe_mask(masks[name]), relative_error=round(error, 6))
    keep_masks(work.model, context, masks)
    return Outcome(work.model, changes)


def _why_whole(candidate: Candidate, gram: Gram, share: float, updates: bool) -> str:
    if share <= 0:
        return "the allocation keeps all of its weights"
    return why_too_few(candidate, gram) if updates else ""


def why_too_few(candidate: Candidate, gram: Gram) -> str:
    """Say why a layer cannot be fitted to so few observations; empty where they are enough."""
    if gram.rows >= candidate.columns:
        return ""
    few = f"{gram.rows} observations of {candidate.columns} inputs"
    return f"{few} do not say what each weight is for: raise examples"


def _on_damped(solve: Solve) -> Solve:
    return lambda weight, gram, share, pattern: solve(weight, damped(gram), share, pattern)


def prune_layer(
    candidate: Candidate, gram: Gram, solve: Solve, share: float, pattern: Pattern
) -> tuple[NDArray[np.floating], Mask, float]:
    """Return a layer's new weight and mask in the weight's shape, and the relative error of its outputs.

    The groups of a convolution are problems of their own. The error is the squared change of the outputs
    over their squares (0 is exact), on the moments given; with wanted inputs, the change from the best that
    a dense layer gives.
    """
    order = pattern.column_order(candidate.weight.shape)
    old, moments = to_matrices(candidate, order), gram.mean[:, order][:, :, order]
    if gram.drift is not None:
        drift = gram.drift[:, order][:, :, order]
        parts = zip(old, moments, drift, strict=True)
        old = np.stack([compensated(w, damped(g), d) for w, g, d in parts])
    found = [solve(w, g, share, pattern) for w, g in zip(old, moments, strict=True)]
    new, mask = np.stack([w for w, _ in found]), np.stack([m for _, m in found])
    lost = sum(output_error(n - o, g) for n, o, g in zip(new, old, moments, strict=True))
    whole = sum(output_error(o, g) for o, g in zip(old, moments, strict=True))
    weight = from_matrices(candidate, new, order).astype(candidate.weight.dtype)
    error = lost / whole if whole > 0 else 0.0
    return weight, from_matrices(candidate, mask, order), error
