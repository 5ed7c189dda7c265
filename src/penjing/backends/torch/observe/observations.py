"""What one output value of a layer is computed from: rows of inputs, and rows of outputs, for linear fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.arrays.patches import windows
from penjing.backends.torch.tensors import CONVOLUTIONS, to_numpy

Rows = Iterator[tuple[NDArray[Any], NDArray[Any]]]

RUN_VALUES = 2**23
"""Input values gathered at a time."""

LEAST_RUNS = 32
"""Runs that the positions are divided into at least."""

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def count_groups(module: nn.Module) -> int:
    """Return into how many independent problems a convolution or a linear layer falls: its groups."""
    return int(module.groups) if isinstance(module, CONVOLUTIONS) else 1


def count_inputs(module: nn.Module) -> int:
    """Return how many inputs one output value is computed from."""
    return int(math.prod(module.weight.shape[1:]))


def gather_rows(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    kept: NDArray[np.int64],
    limit: int,
    rng: np.random.Generator,
    counting: NDArray[np.bool_] | None = None,
) -> Rows | None:
    """Return inputs `[n, blocks · inputs]` and outputs `[n, outputs]` of a layer, in runs of neighbours.

    Args:
        module: a convolution of one to three axes, or a linear layer.
        x: its input, of any examples.
        y: outputs as of the layer on `x`, but that they may have more channels.
        kept: the channels of `y` that the layer has.
        limit: at most so many output positions, drawn without replacement.
        rng: of the draw.
        counting: which positions are drawn from; None: all.

    Returns:
        At least `LEAST_RUNS` runs where there are so many positions, in order, so that far runs come from
        different examples; None where `y` has other positions than the layer's output on `x`.
    """
    inputs, outputs = _seen(module, to_numpy(x)), _made(module, y)
    positions = outputs.shape[:-1]
    if inputs.shape[: len(positions)] != positions:
        return None
    if counting is None or counting.shape != positions:
        counting = np.ones(positions, bool)
    chosen = np.flatnonzero(counting)
    if len(chosen) > limit:
        chosen = np.sort(rng.choice(chosen, limit, replace=False))
    step = max(1, min(len(chosen) // LEAST_RUNS, RUN_VALUES // (count_groups(module) * count_inputs(module))))
    return _runs(inputs, outputs, kept, chosen, step)


def _runs(
    inputs: NDArray[Any], outputs: NDArray[Any], kept: NDArray[np.int64], chosen: NDArray[np.int64], step: int
) -> Rows:
    for start in range(0, len(chosen), step):
        index = np.unravel_index(chosen[start : start + step], outputs.shape[:-1])
        wanted = outputs[index]
        yield inputs[index].reshape(len(wanted), -1), wanted[:, kept]


def _seen(module: nn.Module, x: NDArray[Any]) -> NDArray[Any]:
    """Return `[n, *positions, channels, *kernel]` of a convolution, the input itself of a linear layer."""
    if not isinstance(module, CONVOLUTIONS):
        return x
    kernel, dilation = module.kernel_size, module.dilation
    if isinstance(module.padding, str):
        wide = [d * (k - 1) if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        padding: Any = tuple((w // 2, w - w // 2) for w in wide)
    else:
        padding = tuple(module.padding)
    return windows(x, kernel, module.stride, padding, dilation, _MODES[module.padding_mode])


def _made(module: nn.Module, y: Tensor) -> NDArray[Any]:
    array = to_numpy(y)
    return np.moveaxis(array, 1, -1) if isinstance(module, CONVOLUTIONS) else array
