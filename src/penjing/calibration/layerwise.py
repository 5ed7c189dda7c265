"""Methods that prune one layer at a time so that its outputs stay near, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.sparsity.gram import Gram, compensated, damped, output_error
from penjing.arrays.sparsity.obc import refit
from penjing.arrays.sparsity.patterns import Pattern
from penjing.calibration.candidates import (
    Candidate,
    candidates,
    done,
    keep_masks,
    matrices,
    skipped,
    unpacked,
)
from penjing.calibration.inputs import (
    calibration_batches,
    called,
    in_passes,
    input_grams,
    unobservable,
    waves,
)
from penjing.calibration.settings import Corrected, LayerWise
from penjing.core.context import Context
from penjing.core.method import Change, Outcome
from penjing.core.progress import Line
from penjing.core.task import Batch
from penjing.core.value import Model

Solve = Callable[[Any, Any, float, Pattern], tuple[Any, Any]]
"""From a weight `[rows, columns]`, the mean of x xᵀ, the share of zeros and the pattern to the new weight and
its mask."""

PROBE = 2
"""Examples that find the order of the layers."""


@dataclass(frozen=True)
class Work:
    """What is to be pruned: layers, data and the order.

    Attributes:
        model: changed in place.
        layers: by name.
        batches: calibration data.
        waves: names of layers that one pass over the data serves, in the order of the data.
        changes: of layers that are left out.
        dense: a copy of the model as it was, where its inputs are aimed at.
        observed: the model whose inputs count: the one that changes, or, not in sequence, the dense one.
    """

    model: Model
    method: LayerWise
    context: Context
    layers: Mapping[str, Candidate]
    batches: Sequence[Batch]
    waves: Sequence[Sequence[str]]
    changes: Sequence[Change]
    dense: Model | None
    observed: Model

    def grams(self, names: Sequence[str]) -> dict[str, Gram]:
        """Return the second moments of the inputs of some layers, in the model as it is now."""
        layers, context = [self.layers[name].layer for name in names], self.context
        return input_grams(context.backend, self.observed, layers, self.batches, context.seed, self.dense)

    def in_passes(self, names: Sequence[str]) -> list[list[str]]:
        """Split names so that the moments of each part fit into memory together."""
        parts = in_passes([self.layers[name].layer for name in names])
        return [[layer.name for layer in part] for part in parts]


def prepare(model: Model, method: LayerWise, context: Context) -> Work:
    """Find layers, data and order.

    Raises:
        Refused: there is no training data.
    """
    found, changes = candidates(model, method, context)
    batches = calibration_batches(context, method.calibration, method.batch_size)
    probe = tuple(x[:PROBE] for x in batches[0][0])
    reasons = {c.name: why for c in found if (why := unobservable(c.layer))}
    named = [c.name for c in found if c.name not in reasons]
    reasons |= called(context.backend, model, named, probe)
    left = [name for name in named if name not in reasons]
    order = waves(context.backend, model, left, probe, context.seed) if method.sequential else [left]
    layers = {c.name: c for c in found if c.name in left}
    changes += [skipped(method, name, reason) for name, reason in reasons.items()]
    dense = context.backend.copy(model) if isinstance(method, Corrected) and method.compensate else None
    observed = model if method.sequential else context.backend.copy(model)
    return Work(model, method, context, layers, batches, order, changes, dense, observed)


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
        return _kept_whole(work.layers[name], gram, share, updates), exact, share

    return _in_order(work, solver)


def refit_layers(work: Work, masks: Mapping[str, NDArray[np.bool_]]) -> Outcome:
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

        def refitted(weight: Any, moments: Any, share: float, pattern: Pattern) -> tuple[Any, Any]:
            part = next(parts)
            return refit(weight, damped(moments), part), part

        share = 1 - float(mask.mean())
        return too_few(candidate, gram) or _kept_whole(candidate, gram, share, True), refitted, share

    return _in_order(work, solver)


def _in_order(work: Work, solver: Callable[[str, Gram], tuple[str, Solve, float]]) -> Outcome:
    """Prune layers in the order of the data; `solver` gives why not, or how and how much."""
    method, context = work.method, work.context
    changes, masks = list(work.changes), {}
    passes = [part for wave in work.waves for part in work.in_passes(wave)]
    for number, names in enumerate(passes, 1):
        context.say(Line.step(f"{type(method).__name__}: {', '.join(names)} ({number} of {len(passes)})"))
        for name, gram in work.grams(names).items():
            reason, solve, share = solver(name, gram)
            if reason:
                changes.append(skipped(method, name, reason))
                continue
            weight, masks[name], error = pruned(work.layers[name], gram, solve, share, method.zeros)
            context.backend.write(work.model, name, {"weight": weight})
            changes.append(done(method, name, masks[name], relative_error=error))
    keep_masks(work.model, context, masks)
    return Outcome(work.model, changes)


def _kept_whole(candidate: Candidate, gram: Gram, share: float, updates: bool) -> str:
    if share <= 0:
        return "the allocation keeps all of its weights"
    return too_few(candidate, gram) if updates else ""


def too_few(candidate: Candidate, gram: Gram) -> str:
    """Say why a layer cannot be fitted to so few observations; empty where they are enough."""
    if gram.rows >= candidate.columns:
        return ""
    few = f"{gram.rows} observations of {candidate.columns} inputs"
    return f"{few} do not say what each weight is for: raise calibration"


def _on_damped(solve: Solve) -> Solve:
    return lambda weight, gram, share, pattern: solve(weight, damped(gram), share, pattern)


def pruned(
    candidate: Candidate, gram: Gram, solve: Solve, share: float, pattern: Pattern
) -> tuple[NDArray[Any], NDArray[np.bool_], float]:
    """Return a layer's new weight and mask in the weight's shape, and the relative error of its outputs.

    The groups of a convolution are problems of their own. The error is the squared change of the outputs
    over their squares (0 is exact), on the moments given; with wanted inputs, the change from the best that
    a dense layer gives.
    """
    order = pattern.column_order(candidate.weight.shape)
    old, moments = matrices(candidate, order), gram.mean[:, order][:, :, order]
    if gram.drift is not None:
        drift = gram.drift[:, order][:, :, order]
        parts = zip(old, moments, drift, strict=True)
        old = np.stack([compensated(w, damped(g), d) for w, g, d in parts])
    found = [solve(w, g, share, pattern) for w, g in zip(old, moments, strict=True)]
    new, mask = np.stack([w for w, _ in found]), np.stack([m for _, m in found])
    lost = sum(output_error(n - o, g) for n, o, g in zip(new, old, moments, strict=True))
    whole = sum(output_error(o, g) for o, g in zip(old, moments, strict=True))
    weight = unpacked(candidate, new, order).astype(candidate.weight.dtype)
    error = lost / whole if whole > 0 else 0.0
    return weight, unpacked(candidate, mask, order), error
