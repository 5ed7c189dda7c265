"""Replace BatchNorm by a normalization that needs no batch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from penjing.core.context import Context
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model


class ReplaceBatchNorm(Method):
    """Put GroupNorm in the place of BatchNorm, for training with batches too small to have statistics.

    GroupNorm normalizes groups of channels of each example by themselves (Wu and He 2018, "Group
    normalization"). Scales and shifts are taken over, yet the network computes something else: it has to be
    trained afterwards. In inference GroupNorm costs time that folded BatchNorm does not.

    Attributes:
        groups: of channels in a layer, at most; the largest divisor of its channels up to it is taken.

    >>> ReplaceBatchNorm(groups=8).stage.name
    'STRUCTURE'
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    groups: int = Field(default=32, ge=1, le=65_536)


@handles(ReplaceBatchNorm, "torch")
def replace_batchnorm(model: Model, method: ReplaceBatchNorm, context: Context) -> Outcome:
    """Return a model with GroupNorm; one change for every BatchNorm layer covered."""
    from penjing.backends.torch.cut.group_norms import count_values_by_channel, replace_batchnorms
    from penjing.backends.torch.observe.batch_statistics import find_batchnorms

    layers = {name: layer for name, layer in find_batchnorms(model).items() if context.covers(name)}
    groups, changes = dict[str, int](), Changes(method)
    if not layers:
        changes.skip("", "no BatchNorm layer")
        return Outcome(model, changes)
    values = count_values_by_channel(model, context.task.valid.example())
    for name, layer in layers.items():
        count = largest_divisor(layer.num_features, method.groups)
        together = values.get(name, 0) * layer.num_features // count
        if name not in values:
            changes.skip(name, "the model does not call it as a module")
        elif together < 2:
            changes.skip(name, "a group of one value has no variance: take fewer groups")
        else:
            groups[name] = count
            changes.done(name, groups=count, values=together)
    return Outcome(replace_batchnorms(model, groups) if groups else model, changes)


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most another.

    >>> largest_divisor(48, 32)
    24
    """
    return next(count for count in range(min(number, most), 0, -1) if number % count == 0)
