"""Re-estimate the statistics of BatchNorm layers after the weights before them changed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from penjing.core.backend import Arrays
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model


class ReestimateBatchNorm(Method):
    """Set running means and variances to the exact values over pooled training data.

    Every BatchNorm layer normalizes with the statistics of the batch while the data passes, so that each
    layer sees its inputs as they will be, and the pooled mean and variance replace the moving averages
    (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", precise BN).

    Attributes:
        batches: batches of training data, at least 1.
        size: examples in each, at least 2.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    batches: int = Field(default=20, ge=1)
    size: int = Field(default=128, ge=2)


@handles(ReestimateBatchNorm, "torch")
def reestimate_batchnorm(model: Model, method: ReestimateBatchNorm, context: Context) -> Outcome:
    """Pass the data once and write the pooled statistics; one change for every BatchNorm layer covered."""
    from penjing.backends.torch.observe.batch_statistics import normalizations, reestimate

    layers = {name: module for name, module in normalizations(model).items() if context.covers(name)}
    if not layers:
        return Outcome(model, [_skipped("", "no BatchNorm layer")])
    kept = {name: module for name, module in layers.items() if module.running_mean is not None}
    moved = reestimate(model, kept, _batches(method, context))
    return Outcome(model, [_change(name, name in kept, moved.get(name)) for name in layers])


def _batches(method: ReestimateBatchNorm, context: Context) -> Iterator[Arrays]:
    """Yield inputs of training data; one example alone has no variance and is left out.

    Raises:
        Refused: at the end, where no batch was large enough.
    """
    used = 0
    for inputs, targets in islice(context.task.train.batches(method.size, context.seed), method.batches):
        if len(targets) > 1:
            yield inputs
            used += 1
    if not used:
        raise Refused(
            "BatchNorm statistics come from batches of 2 examples or more",
            place="task.train",
            value=len(context.task.train),
            fix="give more training data, or leave the step out",
        )


def _change(name: str, keeps: bool, moved: Any) -> Change:
    if not keeps:
        return _skipped(name, "it keeps no running statistics")
    if moved is None:
        return _skipped(name, "the model does not call it as a module")
    return _done(name, moved.count, moved.mean_shift)


def _skipped(layer: str, reason: str) -> Change:
    return Change(method="ReestimateBatchNorm", layer=layer, status="skipped", reason=reason)


def _done(layer: str, observations: int, mean_shift: float) -> Change:
    detail: dict[str, float | int | str] = {
        "observations": observations,
        "mean_shift_in_std": round(mean_shift, 6),
    }
    return Change(method="ReestimateBatchNorm", layer=layer, status="done", detail=detail)


@handles(ReestimateBatchNorm, "numpy")
def reestimate_batchnorm_numpy(model: Model, method: ReestimateBatchNorm, context: Context) -> Outcome:
    """Write the pooled statistics of a NumPy net: what the handler for torch does, exact and slow."""
    from penjing.backends.numpy.statistics import pool_statistics

    backend = context.backend
    kinds = {layer.name: layer.kind for layer in backend.layers(model)}
    layers = [name for name, kind in kinds.items() if kind == "batchnorm" and context.covers(name)]
    if not layers:
        return Outcome(model, [_skipped("", "no BatchNorm layer")])
    changes = []
    for name, new in pool_statistics(model, layers, _batches(method, context)).items():
        old = backend.read(model, name)
        eps = model.node(name)["eps"]
        shift = np.abs(new.mean - old["running_mean"]) / np.sqrt(old["running_var"] + eps)
        backend.write(model, name, {"running_mean": new.mean, "running_var": new.variance})
        changes.append(_done(name, new.count, float(shift.mean())))
    return Outcome(model, changes)
