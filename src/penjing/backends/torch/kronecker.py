"""Kronecker factors: second moments of layers' inputs and of the gradients by their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.arrays.unit_surgeon import Factors
from penjing.backends.torch.example_gradients import recorded
from penjing.backends.torch.observe import loss_function
from penjing.backends.torch.tensors import (
    CONVOLUTIONS,
    device_of,
    evaluating,
    layer_module,
    select_output,
    to_inputs,
    to_numpy,
)
from penjing.core.backend import Sample


def factors(model: nn.Module, layers: Sequence[str], sample: Sample) -> dict[str, Factors]:
    """Return the factors of linear layers and 1 by 1 convolutions, from one backward pass over a sample.

    Positions of which the loss is independent (padding behind a mask) count for nothing. In evaluation mode.
    Memory: 8 · (inputs² + outputs²) bytes for each layer.

    Args:
        model: modes are put back.
        layers: names of such layers.
        sample: data and loss, a mean over the batch.

    Returns:
        By layer; those that the model does not call as a module are missing.
    """
    modules = {name: layer_module(model, name) for name in layers}
    function = loss_function(sample.loss)
    sums: dict[str, tuple[Any, Any]] = {}
    positions: dict[str, int] = dict.fromkeys(layers, 0)
    examples = 0
    for inputs, targets in itertools.islice(sample.split.batches(sample.size, sample.seed), sample.batches):
        examples += len(targets)
        with evaluating(model), torch.enable_grad(), recorded(modules) as calls:
            output = select_output(model(*to_inputs(model, inputs)))
            value = function(output, torch.from_numpy(np.array(targets)).to(device_of(model)))
        made = [(name, x, y) for name, pairs in calls.items() for x, y in pairs]
        slopes = torch.autograd.grad(value * len(targets), [y for _, _, y in made], allow_unused=True)
        for (name, x, _), slope in zip(made, slopes, strict=True):
            if slope is not None:
                seen, rows = _rows(modules[name], x), _rows(modules[name], slope)
                heard = rows.ne(0).any(1)
                seen = nn.functional.pad(seen[heard], (0, 1), value=1.0)
                rows, before = rows[heard], sums.get(name, (0, 0))
                sums[name] = before[0] + seen.T @ seen, before[1] + rows.T @ rows
                positions[name] += len(seen)
    return {
        name: Factors(to_numpy(inputs) / max(positions[name], 1), to_numpy(outputs) / max(examples, 1))
        for name, (inputs, outputs) in sums.items()
    }


def _rows(module: nn.Module, x: Any) -> Any:
    """Return values as `[positions, channels]` in double precision."""
    x = x.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else x
    return x.reshape(-1, x.shape[-1]).double()
