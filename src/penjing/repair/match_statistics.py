"""Give every channel behind a cut the mean and the variance that it had in the original."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.moments import Moments, match
from penjing.core.context import Context
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from penjing.backends.torch.observe.comparison import Comparison
    from penjing.backends.torch.observe.lockstep import Pass

KINDS = ("conv", "depthwise", "linear", "batchnorm")

EXACT = 1e-6
"""A channel's moments are the original's when they differ by less than this, in its standard deviations."""


class MatchStatistics(Method):
    """Match mean and variance of every channel to the original's, by scale and shift.

    Layer by layer in the order of the model, over training data, each behind the matched ones before it:
    BatchNorm layers take their statistics anew and then match by their affine parameters, the others by the
    rows of their weights and their biases (Jordan et al. 2022, "REPAIR"). Labels are not used.

    Attributes:
        examples: of the training data, at least 32; fewer are used where outputs of layers would not fit
            into memory.
        variance: False corrects means only, by biases: the empirical bias correction of Nagel et al. 2019.
        shrinkage: limits the scale of channels that hardly vary any more: this share of the mean variance
            of the layer's channels is added to both variances before they are compared.

    >>> MatchStatistics(variance=False).examples
    1024
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    examples: int = Field(default=1024, ge=32, le=1_000_000)
    variance: bool = True
    shrinkage: float = Field(default=0.01, ge=0, le=1)


@dataclass
class _Work:
    """What the hooks of one pass share; `changes` is what they leave behind."""

    model: Model
    method: MatchStatistics
    context: Context
    comparison: Comparison
    original: Pass
    changes: Changes


@handles(MatchStatistics, "torch")
def match_statistics(model: Model, method: MatchStatistics, context: Context) -> Outcome:
    """Pass the data once through both modules, matching on the way; a change for every layer covered.

    Raises:
        Refused: fewer than 32 training examples.
    """
    from penjing.backends.torch.observe.comparison import compare
    from penjing.backends.torch.observe.lockstep import Pass, run_hooked

    changes = Changes(method)
    layers = [x.name for x in context.backend.layers(model) if x.kind in KINDS and context.covers(x.name)]
    if not layers:
        changes.skip("", "no convolution, linear or BatchNorm layer")
        return Outcome(model, changes)
    found = compare(model, layers, method.examples, context)
    reasons = dict(found.reasons)
    for name in found.layers:
        reason = _why_unsuited(model.get_submodule(name), method)
        follower = found.batchnorm.get(name, "")
        if follower in found.layers and not _why_unsuited(model.get_submodule(follower), method):
            reason = f"{follower} behind it is matched"
        if reason:
            reasons[name] = reason
    for name, reason in reasons.items():
        changes.skip(name, reason)
    chosen = [name for name in found.layers if name not in reasons]
    with Pass(found.original, chosen, found.inputs) as original:
        work = _Work(model, method, context, found, original, changes)
        before = {name: partial(_renormalize, method) for name in chosen if _is_batchnorm(model, name)}
        after = {name: partial(_match, name, work) for name in chosen}
        run_hooked(model, before, found.inputs, after)
    return Outcome(model, sorted(changes, key=lambda change: layers.index(change.layer)))


def _is_batchnorm(model: Model, name: str) -> bool:
    return hasattr(model.get_submodule(name), "running_mean")


def _why_unsuited(module: nn.Module, method: MatchStatistics) -> str:
    """Return why a layer cannot be matched, or nothing."""
    if hasattr(module, "running_mean"):
        if module.weight is None:
            return "it has no affine parameters"
        return "it keeps no running statistics" if module.running_mean is None else ""
    return "" if method.variance or module.bias is not None else "it has no bias"


def _renormalize(method: MatchStatistics, module: nn.Module, x: Tensor) -> None:
    """Give a BatchNorm layer the statistics of what it takes, so that training starts from true ones."""
    from penjing.backends.torch.observe.comparison import renew_statistics

    if method.variance:
        renew_statistics(module, x)


def _match(name: str, work: _Work, module: nn.Module, output: Tensor) -> Tensor:
    """Match one layer; return the output that it now gives."""
    import torch

    wanted = work.original.output(name)
    if wanted is None:
        work.changes.skip(name, "the original reaches it in another order")
        return output
    axis = output.ndim - 1 if isinstance(module, torch.nn.Linear) else 1
    now, kept = _moments(output, axis), work.comparison.kept[name]
    mean, variance = _moments(wanted, axis)
    goal = mean[kept], variance[kept]
    scale, shift = match(now, goal, work.method.shrinkage)
    if not work.method.variance:
        scale, shift = np.ones_like(scale), goal[0] - now[0]
    own = work.context.backend.read(work.model, name)
    if own.get("bias") is None:
        shift = np.zeros_like(shift)
    apart = _apart(now, goal)
    if apart < EXACT:
        work.changes.skip(name, "its statistics are those of the original")
        return output
    work.context.backend.write(work.model, name, _scaled(own, scale, shift))
    work.changes.done(
        name,
        "" if "bias" in own else "no bias: the mean stays",
        apart_in_std=round(apart, 6),
        scale_min=round(float(scale.min()), 6),
        scale_max=round(float(scale.max()), 6),
    )
    shape = [-1 if a == axis else 1 for a in range(output.ndim)]
    factor, term = (torch.from_numpy(part).to(output).reshape(shape) for part in (scale, shift))
    return output * factor + term


def _moments(output: Tensor, axis: int) -> Moments:
    axes = [a for a in range(output.ndim) if a != axis]
    values = output.double()
    return values.mean(axes).cpu().numpy(), values.var(axes, correction=0).cpu().numpy()


def _apart(now: Moments, goal: Moments) -> float:
    """Return the mean over channels of how far mean and deviation are from the goal's, in its deviations."""
    deviation = np.sqrt(goal[1])
    unit = np.where(deviation > 0, deviation, 1.0)
    return float(((np.abs(now[0] - goal[0]) + np.abs(np.sqrt(now[1]) - deviation)) / unit).mean())


def _scaled(
    own: dict[str, NDArray[Any]], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> dict[str, NDArray[Any]]:
    weight = own["weight"]
    rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
    tensors = {"weight": (weight * rows).astype(weight.dtype)}
    if own.get("bias") is not None:
        tensors["bias"] = (own["bias"] * scale + shift).astype(own["bias"].dtype)
    return tensors
