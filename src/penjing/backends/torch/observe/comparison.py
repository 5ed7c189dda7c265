"""A changed module beside the original that it was made from: which layers can be compared, on which data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.observe.lockstep import Usage, record_usage
from penjing.backends.torch.structure.history import lineage
from penjing.backends.torch.tensors import own_tensors, tensors_of, to_inputs
from penjing.core.context import Context
from penjing.core.errors import Refused

LEAST_EXAMPLES = 32
LIVE_BYTES = 2**29
"""The largest output of a layer, over all examples, takes at most this; fewer examples are used else."""


@dataclass(frozen=True)
class Comparison:
    """What can be compared.

    Attributes:
        layers: names of the layers that both modules call once, in the order of the changed one.
        kept: for some of them, the channels of the original that the changed one still has.
        batchnorm: for some of them, the BatchNorm layer that takes nothing but their output.
        reasons: of every other layer, why it cannot be compared.
        inputs: examples of the training data, as one batch.
        original: the original module.
    """

    layers: tuple[str, ...]
    kept: Mapping[str, NDArray[np.int64]]
    batchnorm: Mapping[str, str]
    reasons: Mapping[str, str]
    inputs: tuple[Tensor, ...]
    original: nn.Module


def compare(model: nn.Module, layers: Sequence[str], examples: int, context: Context) -> Comparison:
    """Look at a module beside `context.original`.

    Args:
        model: made from the original by any steps that kept its layers' names.
        layers: names of convolutions, linear layers or BatchNorm layers of the module.
        examples: as many training examples at most; fewer where `LIVE_BYTES` would not hold them.
        context: of the plan.

    Raises:
        Refused: there are fewer than `LEAST_EXAMPLES` training examples.
    """
    arrays = next(context.task.train.batches(examples, context.seed))[0]
    if len(arrays[0]) < LEAST_EXAMPLES:
        raise Refused(
            f"repair needs at least {LEAST_EXAMPLES} training examples",
            value=len(arrays[0]),
            place="task.train",
            fix="give more training data, labels do not matter, or leave the step out",
        )
    one = tuple(x[:1] for x in arrays)
    original: nn.Module = context.original
    known = dict(original.named_modules())
    here = record_usage(model, layers, to_inputs(model, one))
    there = record_usage(original, [name for name in layers if name in known], to_inputs(original, one))
    largest = max((call.bytes for call in (*here.values(), *there.values())), default=0)
    count = min(len(arrays[0]), max(LEAST_EXAMPLES, LIVE_BYTES // max(largest, 1)))
    reasons, kept = {}, {}
    for name in layers:
        reason = _reason(model, name, here[name], there.get(name))
        if not reason:
            channels = _channels(model, original, name)
            reason = "" if channels is not None else "its channels cannot be traced to the original's"
            if channels is not None:
                kept[name] = channels
        if reason:
            reasons[name] = reason
    return Comparison(
        layers=tuple(name for name in layers if name not in reasons),
        kept=kept,
        batchnorm={name: call.batchnorm for name, call in here.items() if call.batchnorm},
        reasons=reasons,
        inputs=to_inputs(model, tuple(x[:count] for x in arrays)),
        original=original,
    )


def make_generator(context: Context, layer: str) -> np.random.Generator:
    """Return random numbers for a layer that do not depend on which other layers are chosen."""
    return np.random.default_rng([context.seed, zlib.crc32(layer.encode())])


def renew_statistics(batchnorm: nn.Module, x: Tensor) -> None:
    """Set the running statistics of a BatchNorm layer to mean and unbiased variance of its input `x`."""
    variance, mean = torch.var_mean(x.double(), [axis for axis in range(x.ndim) if axis != 1])
    batchnorm.running_mean.copy_(mean)
    batchnorm.running_var.copy_(variance)


def _reason(model: nn.Module, name: str, here: Usage, there: Usage | None) -> str:
    if there is None:
        return "the original has no layer of this name"
    if not here.times or not there.times:
        return "the model does not call it as a module"
    if here.times > 1 or there.times > 1:
        return "it is called several times"
    own = {id(tensor): local for local, tensor in own_tensors(model.get_submodule(name)).items()}
    shared = [
        other
        for other, tensor in tensors_of(model).items()
        if id(tensor) in own and other != f"{name}.{own[id(tensor)]}".lstrip(".")
    ]
    return f"it shares a tensor with {shared[0]}" if shared else ""


def _channels(model: nn.Module, original: nn.Module, name: str) -> NDArray[np.int64] | None:
    """Return which of the original layer's channels are left, or None where that is not known.

    Lineage counts from the first model there was; the original may itself have been cut.
    """
    here, there = (own_tensors(m.get_submodule(name)) for m in (model, original))
    tensor = next((t for t in ("weight", "running_mean") if here.get(t) is not None), None)
    if tensor is None or there.get(tensor) is None:
        return None
    wide, narrow = len(there[tensor]), len(here[tensor])
    full = f"{name}.{tensor}".lstrip(".")
    now, before = (lineage(m).get(full, {}).get(0) for m in (model, original))
    if now is None or (before is not None and np.array_equal(now, before)):
        return np.arange(wide) if narrow == wide else None
    before = np.arange(max(wide, int(now.max(initial=-1)) + 1)) if before is None else before
    place = {int(index): position for position, index in enumerate(before)}
    found = [place[int(index)] for index in now if int(index) in place]
    if len(before) != wide or len(found) != len(now) or len(now) != narrow:
        return None
    return np.array(found, np.int64)
