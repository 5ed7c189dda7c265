"""Which positions of a layer's output the model's output depends on: padding behind a mask does not count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.curvature.per_sample_gradients import recording
from penjing.backends.torch.tensors import evaluating, find_layer, select_output

CHUNK = 32
"""Examples that run at once."""


def find_contributing_positions(
    model: nn.Module, layers: Sequence[str], inputs: tuple[Tensor, ...], seed: int
) -> dict[str, NDArray[np.bool_]]:
    """Return for layers with several positions which of them move the model's output.

    Told from the gradient of a random direction of the output, in evaluation mode.

    Args:
        model: modes are put back.
        layers: names of layers whose outputs are `[examples, positions..., channels]`.
        inputs: tensors of a batch, examples first.
        seed: of the direction.

    Returns:
        `[examples, positions...]` by layer; layers that are called other than once, have one position only
        or no gradient are missing.
    """
    modules = {name: find_layer(model, name) for name in layers}
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in layers}
    for start in range(0, len(inputs[0]), CHUNK):
        some = tuple(x[start : start + CHUNK] for x in inputs)
        with evaluating(model), torch.enable_grad(), recording(modules) as calls:
            output = select_output(model(*some))
        made = {
            name: pairs[0][1] for name, pairs in calls.items() if len(pairs) == 1 and pairs[0][1].ndim > 2
        }
        if not made or not output.requires_grad:
            return {}
        direction = torch.randn(output.shape, generator=generator).to(output)
        slopes = torch.autograd.grad((output * direction).sum(), list(made.values()), allow_unused=True)
        for name, slope in zip(made, slopes, strict=True):
            if slope is not None:
                parts[name].append(slope.ne(0).any(-1).cpu().numpy())
    found = {name: np.concatenate(masks) for name, masks in parts.items() if masks}
    return {name: mask for name, mask in found.items() if len(mask) == len(inputs[0])}
