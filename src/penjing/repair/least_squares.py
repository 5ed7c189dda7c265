"""Refit the layers behind a cut, so that their outputs are again those of the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.arrays.least_squares import (
    RIDGES,
    NormalEquations,
    best_bias,
    cross_checked,
    relative_error,
)
from penjing.core.context import Context
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles
from penjing.core.value import Model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from penjing.backends.torch.observe.comparison import Comparison
    from penjing.backends.torch.observe.lockstep import Pass

KINDS = ("conv", "depthwise", "linear", "batchnorm")
GRAM_BYTES = 2**28
"""Sums of products of a layer's inputs and outputs take at most this much; there are two sets of them."""

EXACT = 1e-9
"""A layer whose relative squared error is below this computes what the original computes."""

EQUAL = "its outputs are those of the original"
ELSEWHERE = "the original computes it in another order or at other positions"
UNTRACKED = "it keeps no running statistics"

HELD_OUT = 4
"""One in so many runs of observations judges the fit on the others."""


class LeastSquares(Method):
    """Refit the weights and biases behind a cut or a mask to the outputs that the original had.

    Layer by layer in the order of the model: over training data, the weights are found whose outputs are
    nearest to the original's on the channels that are left, given the inputs that the layer has now, behind
    the layers that were refitted before it. A BatchNorm layer whose outputs are not the original's gets the
    mean and variance of what it takes now. Masked weights stay zero. Labels are not used.

    Ridge regression around the present weights (for channels: He, Zhang & Sun 2017, "Channel pruning for
    accelerating very deep neural networks"; for masks: the refit of Frantar & Alistarh 2022 and Meng et al.
    2024 on a fixed support).

    Attributes:
        examples: of the training data, at least 32; fewer are used where outputs of layers would not fit
            into memory.
        observations: output positions that a layer's fit is taken over at most, drawn without replacement
            from those that the original's output depends on (not from padding behind a mask).
        ridge: pull towards the present weights, relative to the mean square of the inputs; None: for each
            layer what errs least on a quarter of the observations that the fit did not see.

    >>> LeastSquares(examples=256).ridge is None
    True
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    examples: int = Field(default=1024, ge=32, le=1_000_000)
    observations: int = Field(default=65_536, ge=64)
    ridge: float | None = Field(default=None, gt=0, le=1e6)


Sums = tuple[NormalEquations, NormalEquations]
"""Those of the fit and those that check it."""


@dataclass
class _Work:
    """What the hooks of one pass share; `changes` is what they leave behind."""

    model: Model
    method: LeastSquares
    context: Context
    comparison: Comparison
    counting: Mapping[str, NDArray[np.bool_]]
    original: Pass
    masks: dict[str, NDArray[np.bool_]]
    changes: Changes

    def centred_behind(self, layer: str) -> bool:
        """Tell whether a BatchNorm layer takes nothing but the layer's output and gets new statistics."""
        name = self.comparison.batchnorm.get(layer, "")
        return name in self.comparison.layers and self.model.get_submodule(name).running_mean is not None


@handles(LeastSquares, "torch")
def least_squares(model: Model, method: LeastSquares, context: Context) -> Outcome:
    """Pass the data once through both modules, refitting on the way; a change for every layer covered.

    Raises:
        Refused: fewer than 32 training examples.
    """
    from penjing.backends.torch.curvature.positions import find_contributing_positions
    from penjing.backends.torch.masks import masks_of
    from penjing.backends.torch.observe.comparison import compare
    from penjing.backends.torch.observe.lockstep import Pass, run_hooked

    changes, kinds = Changes(method), {layer.name: layer.kind for layer in context.backend.layers(model)}
    layers = [name for name, kind in kinds.items() if kind in KINDS and context.covers(name)]
    if not layers:
        changes.skip("", "no convolution, linear or BatchNorm layer")
        return Outcome(model, changes)
    found = compare(model, layers, method.examples, context)
    linear = [name for name in found.layers if kinds[name] == "linear"]
    counting = find_contributing_positions(found.original, linear, found.inputs, context.seed)
    for name, reason in found.reasons.items():
        changes.skip(name, reason)
    with Pass(found.original, found.layers, found.inputs) as original:
        work = _Work(model, method, context, found, counting, original, masks_of(model), changes)
        repairs = {"batchnorm": _renormalize}
        hooks = {name: partial(repairs.get(kinds[name], _refit), name, work) for name in found.layers}
        run_hooked(model, hooks, found.inputs)
    return Outcome(model, sorted(changes, key=lambda change: layers.index(change.layer)))


def _refit(name: str, work: _Work, module: nn.Module, x: Tensor) -> None:
    """Refit a layer on its input, unless that would not bring its outputs nearer to the original's."""
    reason, sums = _sums(name, work, module, x)
    if sums is None:
        work.changes.skip(name, reason)
        return
    own = work.context.backend.read(work.model, name)
    weight, bias = own["weight"].reshape(len(own["weight"]), -1), own.get("bias")
    reason = _unneeded(sums, weight, bias)
    if reason:
        work.changes.skip(name, reason)
        return
    # BatchNorm takes the mean away: without a bias of its own the layer then has to fit only what varies.
    free = bias is None and work.centred_behind(name)
    support = work.masks.get(f"{name}.weight".lstrip("."))
    ridges = RIDGES if work.method.ridge is None else (work.method.ridge,)
    fit = cross_checked(*sums, weight, best_bias(sums[0], weight) if free else bias, ridges, support)
    if not fit.helps:
        work.changes.skip(name, "a fit would not bring its outputs nearer to the original's")
        return
    tensors = {"weight": fit.weight.reshape(own["weight"].shape).astype(own["weight"].dtype)}
    if bias is not None and fit.bias is not None:
        tensors["bias"] = fit.bias.astype(bias.dtype)
    work.context.backend.write(work.model, name, tensors)
    work.changes.done(
        name,
        error_before=round(fit.before, 6),
        error_after=round(fit.after, 6),
        ridge=fit.ridge,
        observations=sums[0].count + sums[1].count,
    )


def _unneeded(sums: Sums, weight: NDArray[Any], bias: NDArray[Any] | None) -> str:
    """Return why a layer is not refitted, or nothing."""
    seen, inputs = sums[0].count + sums[1].count, weight.shape[1]
    if relative_error(sums[0] + sums[1], weight, bias) <= EXACT:
        return EQUAL
    few = sums[0].count <= inputs or not sums[1].count
    return f"{seen} observations are too few for {inputs} inputs" if few else ""


def _sums(name: str, work: _Work, module: nn.Module, x: Tensor) -> tuple[str, Sums | None]:
    """Return why a layer cannot be refitted, or its sums for the fit and for the check."""
    from penjing.backends.torch.observe.comparison import make_generator
    from penjing.backends.torch.observe.observations import count_groups, count_inputs, gather_rows

    blocks, inputs, outputs = count_groups(module), count_inputs(module), len(module.weight)
    needed = 8 * inputs * (blocks * inputs + outputs)
    if needed > GRAM_BYTES:
        return f"sums over {inputs} inputs take {needed >> 20} MiB, the limit is {GRAM_BYTES >> 20} MiB", None
    wanted, kept = work.original.output(name), work.comparison.kept[name]
    if wanted is None:
        return ELSEWHERE, None
    draw, counting = make_generator(work.context, name), work.counting.get(name)
    rows = gather_rows(module, x, wanted, kept, work.method.observations, draw, counting)
    if rows is None:
        return ELSEWHERE, None
    fit, check = (NormalEquations(blocks, inputs, outputs // blocks) for _ in range(2))
    for number, (seen, made) in enumerate(rows):
        (check if number % HELD_OUT == HELD_OUT - 1 else fit).add(seen, made)
    return "", (fit, check)


def _renormalize(name: str, work: _Work, module: nn.Module, x: Tensor) -> None:
    """Give a BatchNorm layer the statistics of what it now takes, unless its output is the original's."""
    from penjing.backends.torch.observe.comparison import renew_statistics

    wanted = work.original.output(name)
    if wanted is None or wanted.shape[0] != x.shape[0] or wanted.shape[2:] != x.shape[2:]:
        work.changes.skip(name, ELSEWHERE)
        return
    goal = wanted[:, work.comparison.kept[name]]
    error = float((module.forward(x) - goal).square().mean() / goal.var().clamp(min=1e-30))
    if module.running_mean is None or error <= EXACT:
        work.changes.skip(name, EQUAL if module.running_mean is not None else UNTRACKED)
        return
    renew_statistics(module, x)
    work.changes.done(name, error_before=round(error, 6), observations=x.numel() // x.shape[1])
