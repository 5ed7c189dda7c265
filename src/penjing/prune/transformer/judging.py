"""In which order the units of each group go, and what each width loses: two ways to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores import consumer_of, consumers
from penjing.arrays.structure.mask_search import fisher, losses_of_widths, mask_gradients, ranked, rearrange
from penjing.arrays.unit_surgeon import surgeon
from penjing.core.backend import GradientBackend, Group, Sample
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.value import Model
from penjing.prune.transformer.method import PruneTransformer

Floats = NDArray[np.float64]
Units = NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """What a group may be cut to.

    Attributes:
        group: of units that go together.
        widths: that it may have, ascending, the last the whole group.
        order: units from the one that stays longest to the one that goes first.
        losses: by width.
        matrix: what removed units lose together; sets are settled by it. None: the order is all.
    """

    group: Group
    widths: Units
    order: Units
    losses: Floats
    matrix: Floats | None = None

    def kept(self, choice: int) -> Units:
        """Return the units that stay at one of the widths, sorted."""
        units = np.sort(self.order[: self.widths[choice]])
        if self.matrix is None or len(units) == self.group.size:
            return units
        return rearrange(units, self.matrix, self.group.blocks)


def judge(
    model: Model, method: PruneTransformer, context: Context, widths: Mapping[str, Units], groups: list[Group]
) -> dict[str, Judged]:
    """Judge groups by the method's criterion; those with a layer that is not called as a module are missing.

    Args:
        model: uncut.
        method: says how.
        context: of the plan.
        widths: that each group may have, by name.
        groups: to judge.

    Raises:
        Refused: gradients that are not finite.
    """
    if not groups:
        return {}
    sample = _sample(method, context)
    layers = list(dict.fromkeys(slot.layer for group in groups for slot in consumers(group)))
    if method.criterion == "refit":
        return _by_refit(model, context, widths, groups, layers, sample)
    return _by_masks(model, method, context, widths, groups, layers, sample)


def _sample(method: PruneTransformer, context: Context) -> Sample:
    loss = context.task.loss
    if method.criterion == "masks" and not method.labels:
        from penjing.backends.torch.curvature.own_labels import OwnLabels

        loss = OwnLabels(loss, context.seed)
    size = min(method.size, method.examples)
    return Sample(context.task.train, loss, method.examples // size, size, context.seed)


def _backend(context: Context) -> GradientBackend:
    backend = context.backend
    assert isinstance(backend, GradientBackend)
    return backend


def _by_masks(
    model: Model,
    method: PruneTransformer,
    context: Context,
    widths: Mapping[str, Units],
    groups: list[Group],
    layers: Sequence[str],
    sample: Sample,
) -> dict[str, Judged]:
    """Judge by the Fisher information of masks (Kwon et al. 2022)."""
    found = mask_gradients(groups, _backend(context).gate_gradients(model, layers, sample))
    _finite({name: [g] for name, g in found.items() if g is not None})
    judged = {}
    for group in groups:
        gradients = found[group.name]
        if gradients is None:
            continue
        matrix = fisher(gradients)
        importance = np.diagonal(matrix)
        order = ranked(importance, group.blocks)
        losses = losses_of_widths(importance, order, widths[group.name])
        together = matrix if method.rearrange else None
        judged[group.name] = Judged(group, widths[group.name], order, losses, together)
    return judged


def _by_refit(
    model: Model,
    context: Context,
    widths: Mapping[str, Units],
    groups: list[Group],
    layers: Sequence[str],
    sample: Sample,
) -> dict[str, Judged]:
    """Judge by what is lost once the layers behind are refitted (Kurtic et al. 2023)."""
    found = _backend(context).kronecker_factors(model, layers, sample)
    _finite({name: [f.inputs, f.slopes] for name, f in found.items()})
    judged = {}
    for group in groups:
        slots = consumers(group)
        if not all(slot.layer in found for slot in slots):
            continue
        takers = [
            consumer_of(context.backend.read(model, slot.layer)["weight"], slot, found[slot.layer])
            for slot in slots
        ]
        order, losses = surgeon(takers, group.blocks, widths[group.name])
        judged[group.name] = Judged(group, widths[group.name], order, losses)
    return judged


def _finite(arrays: Mapping[str, Sequence[Floats]]) -> None:
    bad = [name for name, parts in arrays.items() if not all(np.isfinite(part).all() for part in parts)]
    if bad:
        raise Refused(
            "gradients of masks are finite",
            value=", ".join(bad[:5]),
            place="PruneTransformer",
            fix="look for a loss that is NaN or infinite on the training data",
        )
