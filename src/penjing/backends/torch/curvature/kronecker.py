"""Kronecker factors: second moments of layers' inputs and of the gradients by their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from penjing.backends.torch.curvature.own_labels import OwnLabels
from penjing.backends.torch.curvature.per_sample_gradients import recording, unfold_input
from penjing.backends.torch.tensors import (
    CONVOLUTIONS,
    device_of,
    evaluating,
    find_layer,
    select_output,
    to_inputs,
    to_numpy,
)
from penjing.core.backend import KroneckerFactors, Sample

POSITIONS = 4096
"""Output positions of a layer that a batch gives at most, drawn at random."""


@dataclass
class _Sums:
    inputs: Tensor | int = 0
    slopes: Tensor | int = 0
    positions: int = 0


def kronecker_factors(model: nn.Module, layers: Sequence[str], sample: Sample) -> dict[str, KroneckerFactors]:
    """Return the factors of layers, from one backward pass over a sample, in evaluation mode.

    The loss is that of labels drawn from the model's own predictions. Positions of which it is independent
    (padding behind a mask) count for nothing. Memory: 8 · (inputs² + outputs²) bytes for each layer.

    Args:
        model: modes are put back.
        layers: names of linear layers and of convolutions.
        sample: data and loss.

    Returns:
        By layer; convolutions with groups or of three dimensions, and layers that the model does not call as
        modules, are missing.
    """
    modules = {name: module for name in layers if _covered(module := find_layer(model, name))}
    generator = torch.Generator().manual_seed(sample.seed)
    sums = {name: _Sums() for name in modules}
    examples = 0
    for count, name, x, slope in _calls(model, modules, sample):
        examples += count
        if slope is not None:
            _add(sums[name], modules[name], (x, slope), generator)
    return {
        name: KroneckerFactors(
            to_numpy(found.inputs) / found.positions, to_numpy(found.slopes) / max(examples, 1)
        )
        for name, found in sums.items()
        if found.positions
    }


def _calls(
    model: nn.Module, modules: dict[str, nn.Module], sample: Sample
) -> Iterator[tuple[int, str, Tensor, Tensor | None]]:
    """Yield how many new examples there are, a layer, its input and the gradient by its output."""
    function = OwnLabels(sample.loss, sample.seed)
    for inputs, targets in itertools.islice(sample.split.batches(sample.size, sample.seed), sample.batches):
        with evaluating(model), torch.enable_grad(), recording(modules) as calls:
            output = select_output(model(*to_inputs(model, inputs)))
            value = function(output, torch.from_numpy(np.array(targets)).to(device_of(model)))
        made = [(name, x, y) for name, pairs in calls.items() for x, y in pairs]
        count = len(targets)
        slopes = torch.autograd.grad(value * count, [y for _, _, y in made], allow_unused=True)
        for (name, x, _), slope in zip(made, slopes, strict=True):
            yield count, name, x, slope
            count = 0


def _add(sums: _Sums, module: nn.Module, call: tuple[Tensor, Tensor], generator: torch.Generator) -> None:
    x, slope = call
    rows = slope.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else slope
    shape = rows.shape[:-1]
    rows = rows.reshape(-1, rows.shape[-1])
    heard = rows.ne(0).any(1).nonzero()[:, 0]
    sums.slopes = sums.slopes + (rows.T @ rows).double()
    if len(heard) > POSITIONS:
        heard = heard[torch.randperm(len(heard), generator=generator)[:POSITIONS].to(heard.device)]
    seen = functional.pad(_seen(module, x, shape, heard), (0, 1), value=1.0)
    sums.inputs = sums.inputs + (seen.T @ seen).double()
    sums.positions += len(seen)


def _seen(module: nn.Module, x: Tensor, shape: tuple[int, ...], chosen: Tensor) -> Tensor:
    """Return what some output positions are computed from, `[chosen, columns]`."""
    if not isinstance(module, CONVOLUTIONS):
        return x.reshape(-1, x.shape[-1])[chosen]
    columns = unfold_input(module, x)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])[chosen]


def _covered(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and not isinstance(module, nn.Conv3d)
    return True
