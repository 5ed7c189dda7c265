"""Re-estimate the statistics of BatchNorm layers after the weights before them changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field

from penjing.calibration.inputs import calibration_batches
from penjing.core.backend import Arrays
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model


class ReestimateBatchNorm(Method):
    """Set running means and variances to the exact values over pooled training data.

    Every BatchNorm layer normalizes with the statistics of the batch while the data passes, so that each
    layer sees its inputs as they will be, and the pooled mean and variance replace the moving averages
    (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", precise BN).

    Attributes:
        examples: of the training data, at least 2.
        batch_size: examples that run at once, at least 2.

    >>> ReestimateBatchNorm(examples=512).batch_size
    128
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    examples: int = Field(default=2560, ge=2, le=1_000_000)
    batch_size: int = Field(default=128, ge=2)


@handles(ReestimateBatchNorm, "torch")
def reestimate_batchnorm(model: Model, method: ReestimateBatchNorm, context: Context) -> Outcome:
    """Pass the data once and write the pooled statistics; one change for every BatchNorm layer covered."""
    from penjing.backends.torch.observe.batch_statistics import find_batchnorms, reestimate

    layers = {name: module for name, module in find_batchnorms(model).items() if context.covers(name)}
    kept = {name: module for name, module in layers.items() if module.running_mean is not None}
    moved = reestimate(model, kept, _batches(method, context)) if kept else {}
    changes = Changes(method)
    for name in layers:
        if name not in kept:
            changes.skip(name, "it keeps no running statistics")
        elif name not in moved:
            changes.skip(name, "the model does not call it as a module")
        else:
            _report(name, moved[name].count, moved[name].mean_shift, changes)
    return _outcome(model, changes)


def _batches(method: ReestimateBatchNorm, context: Context) -> Iterator[Arrays]:
    """Yield inputs of training data; one example alone has no variance and is left out.

    Raises:
        Refused: at the end, where no batch was large enough.
    """
    used = 0
    for inputs, targets in calibration_batches(context, method.examples, method.batch_size):
        if len(targets) > 1:
            yield inputs
            used += 1
    if not used:
        raise Refused(
            "must have at least 2 examples to take statistics over",
            place="task.train",
            value=len(context.task.train),
            fix="give more training data, or leave the step out",
        )


def _report(layer: str, observations: int, mean_shift: float, changes: Changes) -> None:
    changes.done(layer, observations=observations, mean_shift_in_std=round(mean_shift, 6))


def _outcome(model: Model, changes: Changes) -> Outcome:
    if not changes:
        changes.skip("", "no BatchNorm layer")
    return Outcome(model, changes)


@handles(ReestimateBatchNorm, "numpy")
def reestimate_batchnorm_numpy(model: Model, method: ReestimateBatchNorm, context: Context) -> Outcome:
    """Write the pooled statistics of a NumPy net: what the handler for torch does, exact and slow."""
    from penjing.backends.numpy.statistics import pool_statistics

    backend = context.backend
    kinds = {layer.name: layer.kind for layer in backend.layers(model)}
    layers = [name for name, kind in kinds.items() if kind == "batchnorm" and context.covers(name)]
    if not layers:
        return _outcome(model, Changes(method))
    changes = Changes(method)
    for name, new in pool_statistics(model, layers, _batches(method, context)).items():
        old = backend.read(model, name)
        eps = model.node(name)["eps"]
        shift = np.abs(new.mean - old["running_mean"]) / np.sqrt(old["running_var"] + eps)
        backend.write(model, name, {"running_mean": new.mean, "running_var": new.variance})
        _report(name, new.count, float(shift.mean()), changes)
    return _outcome(model, changes)
