"""Inputs made from what BatchNorm layers remember of the data that a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.hooks import hooked
from penjing.backends.torch.observe.batch_statistics import find_tracked_batchnorms
from penjing.backends.torch.tensors import evaluating, to_inputs, to_numpy
from penjing.core.backend import Arrays
from penjing.core.errors import Refused

RATE = 0.1
"""Of Adam, on inputs of unit variance, as in the paper."""


def synthesize(model: nn.Module, example: Arrays, count: int, steps: int, seed: int) -> Arrays:
    """Return inputs with which the inputs of BatchNorm layers have the moments that the layers keep.

    Noise of unit variance is changed by Adam until mean and standard deviation of each channel, over the
    batch, are near the running ones: the mean over layers of ((m - μ) / σ)² + (s / σ - 1)² is minimized. Cai
    et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", with moments in units of σ, so that layers
    count alike. Inputs are as good as the moments: those of a network that was cut are to be re-estimated
    first.

    Args:
        model: in any mode; nothing in it changes.
        example: inputs of one batch, of which only shapes and types are used.
        count: inputs to be made, at least 2.
        steps: of Adam, at least 1.
        seed: of the noise.

    Returns:
        One array for each input, float32, `[count, ...]`.

    Raises:
        Refused: no BatchNorm layer with running statistics is called; an input is no float; what was made is
            not finite.
    """
    require_floats(example)
    given = to_inputs(model, tuple(x[:1] for x in example))
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn((count, *x.shape[1:]), generator=generator).to(x).requires_grad_() for x in given]
    optimizer = torch.optim.Adam(made, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                loss = _distance(model, made)
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    found = tuple(_finite(to_numpy(x)) for x in made)
    return found


def require_floats(example: Arrays) -> None:
    """Refuse examples of which an input holds no floating-point numbers: none can be made.

    Raises:
        Refused: see above.
    """
    for number, x in enumerate(example):
        if x.dtype.kind != "f":
            raise Refused(
                "must hold floating-point numbers where inputs are made",
                value=x.dtype,
                place=f"task.train, input {number}",
                fix="use training data, data='train'",
            )


def _distance(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean distance of moments over all calls of BatchNorm layers."""
    parts: list[Tensor] = []

    layers = find_tracked_batchnorms(model)

    def watch(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        layer, x = layers[name], given[0]
        dims = [axis for axis in range(x.ndim) if axis != 1]
        scale = (layer.running_var + layer.eps).sqrt()
        mean = (x.mean(dims) - layer.running_mean) / scale
        spread = (x.var(dims, correction=0) + layer.eps).sqrt() / scale - 1
        parts.append((mean.square() + spread.square()).mean())

    with hooked(layers, watch):
        model(*inputs)
    if not parts:
        raise Refused(
            "needs BatchNorm layers, which remember the data",
            value="a model that calls none",
            place=type(model).__name__,
            fix="use training data, data='train', or to distil data='noise'",
        )
    return torch.stack(parts).mean()


def _finite(x: NDArray[Any]) -> NDArray[Any]:
    if not np.isfinite(x).all():
        raise Refused(
            "made inputs must be finite",
            value="NaN or infinite ones",
            place="calibration",
            fix="look for NaN in the model's weights and BatchNorm statistics",
        )
    return x
