"""Give each score what it needs, from the backend and the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores import SCORES, Floats, Tensors, consumers
from penjing.core.backend import Backend, GradientBackend, Group, Layer, Sample
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.value import Model
from penjing.prune.channels.method import PruneChannels

_WITHOUT_DATA = ("seed", "weights")


def refuse_too_little_data(method: PruneChannels, context: Context) -> None:
    """Refuse training data of less than one batch, where the score needs data."""
    found = len(context.task.train)
    if SCORES[method.score].needs not in _WITHOUT_DATA and found < method.size:
        raise Refused(
            f"the score {method.score} has a batch of {method.size} examples",
            value=found,
            place="task.train",
            fix="lower PruneChannels.size, or use score='l2'",
        )


def score_groups(
    model: Model, method: PruneChannels, context: Context, groups: list[Group], layers: tuple[Layer, ...]
) -> dict[str, Floats]:
    """Return the scores of groups by name, those of different groups in one unit.

    Groups that the score says nothing of are left out.

    Raises:
        Refused: a score with gradients on a backend without them, or one that is not finite.
    """
    score, backend = SCORES[method.score], context.backend
    tensors = {layer.name: backend.read(model, layer.name) for layer in layers}
    found: Mapping[str, Floats | None]
    if score.needs == "seed":
        found = {group.name: score.function(group, context.seed) for group in groups}
    elif score.needs == "weights":
        found = {group.name: score.function(group, tensors) for group in groups}
    elif score.needs == "inputs":
        found = score.function(groups, tensors, _inputs(model, method, context, groups))
    else:
        found = _with_gradients(model, method, context, groups, tensors)
    scores = {name: values for name, values in found.items() if values is not None}
    _refuse_not_finite(scores, method)
    return scores if score.comparable else {name: _by_mean(values) for name, values in scores.items()}


def _with_gradients(
    model: Model, method: PruneChannels, context: Context, groups: list[Group], tensors: Tensors
) -> dict[str, Floats]:
    score, task, backend = SCORES[method.score], context.task, _with_gradients_or_refused(method, context)
    sample = Sample(task.train, task.loss, method.batches, method.size, context.seed)
    found: dict[str, Floats]
    if score.needs == "gates":
        layers = list(dict.fromkeys(slot.layer for group in groups for slot in consumers(group)))
        found = score.function(groups, backend.gate_gradients(model, layers, sample))
    elif score.needs == "curvature":
        found = score.function(groups, tensors, backend.hessian_diagonals(model, sample))
    elif score.needs == "factors":
        layers = list(dict.fromkeys(slot.layer for group in groups for slot in consumers(group)))
        found = score.function(groups, tensors, backend.kronecker_factors(model, layers, sample))
    else:
        batches = backend.gradients(model, task.train, task.loss, method.batches, method.size, context.seed)
        found = score.function(groups, tensors, batches)
    return found


def _with_gradients_or_refused(method: PruneChannels, context: Context) -> GradientBackend:
    backend: Backend = context.backend
    if not isinstance(backend, GradientBackend):
        raise Refused(
            f"the score {method.score} has gradients",
            value=backend.name,
            place="PruneChannels.score",
            fix="use score='l2', or prune before the model leaves its framework",
        )
    return backend


def _inputs(
    model: Model, method: PruneChannels, context: Context, groups: list[Group]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the inputs of the consuming layers that the backend can observe, batch by batch."""
    slots = [slot for group in groups for slot in consumers(group)]
    # Attention in one module has several inputs, and its weights names of their own.
    wanted = list(dict.fromkeys(slot.layer for slot in slots if slot.tensor == "weight"))
    seen = wanted
    if not _observed(model, wanted, context):
        seen = [layer for layer in wanted if _observed(model, [layer], context)]
    data = islice(context.task.train.batches(method.size, context.seed), method.batches)
    for batch in context.backend.observe(model, seen, data):
        yield {layer: x for layer, (x, _) in batch.items()}


def _observed(model: Model, layers: list[str], context: Context) -> bool:
    """Tell whether the backend can observe these layers, by one example."""
    example = context.task.valid.example()
    try:
        next(context.backend.observe(model, layers, iter([(example, np.zeros(1))])))
    except Refused:
        return False
    return True


def _by_mean(values: Floats) -> Floats:
    mean = float(values.mean())
    return values / mean if mean > 0 else values


def _refuse_not_finite(scores: Mapping[str, Floats], method: PruneChannels) -> None:
    bad = [name for name, values in scores.items() if not np.isfinite(values).all()]
    if bad:
        raise Refused(
            "scores are finite",
            value=", ".join(bad[:5]),
            place=f"score {method.score}",
            fix="look for a loss that is NaN or infinite on the training data",
        )
