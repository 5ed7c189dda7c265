"""What rounding one layer costs the loss: second derivatives along the change of the layer's output."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.curvature.per_sample_gradients import recording
from penjing.backends.torch.quantizers import Quantizer, set_quantizers
from penjing.backends.torch.tensors import device_of, evaluating, select_output, to_inputs
from penjing.core.backend import Sample

Pair = tuple[Quantizer | None, Quantizer | None]
"""Quantizers of a layer's weight and of its input."""


def rounding_losses(
    model: nn.Module, options: Mapping[str, Sequence[Pair]], sample: Sample
) -> dict[str, NDArray[np.float64]]:
    """Return how much the loss is expected to rise when one layer alone computes with rounded values.

    `1/2 E[(sum of dv/dy dy)^2]` over examples: dy is the change of the layer's output, the sum is over its
    elements, and v is the model's output along a random direction whose covariance is the curvature of the
    loss by the output. That is the second-order term in the Gauss-Newton form, which for cross-entropy is
    the Fisher information (Martens 2020, "New insights and perspectives on the natural gradient method"),
    all of it within the layer: nothing is taken as diagonal. One forward and backward pass over the sample,
    and a run of each layer for each of its options.

    Args:
        model: in float; modes are put back.
        options: by layer, of classes that take quantizers.
        sample: data and loss, the targets not used. Any loss but `cross_entropy` is taken for half the
            squared error, summed over an example's output.

    Returns:
        By layer `[options]`, in the unit of the loss for an example, at least 0; 0 for layers that are not
        called.
    """
    layers = {
        name: [_rounding(model.get_submodule(name), *pair) for pair in options[name]] for name in options
    }
    modules = {name: model.get_submodule(name) for name in options}
    totals = {name: np.zeros(len(made)) for name, made in layers.items()}
    generator, examples = torch.Generator(device_of(model)).manual_seed(sample.seed), 0
    for inputs, targets in itertools.islice(sample.split.batches(sample.size, sample.seed), sample.batches):
        with evaluating(model), torch.enable_grad(), recording(modules) as calls:
            output = select_output(model(*to_inputs(model, inputs)))
            along = _direction(output.detach(), sample.loss == "cross_entropy", generator)
        made = [y for pairs in calls.values() for _, y in pairs]
        slopes = iter(torch.autograd.grad((output * along).sum(), made, allow_unused=True))
        examples += len(targets)
        for name, pairs in calls.items():
            heard = [(x, y, slope) for x, y in pairs if (slope := next(slopes)) is not None]
            for option, layer in enumerate(layers[name]):
                totals[name][option] += _squared(layer, heard, len(targets))
    return {name: total / (2 * max(examples, 1)) for name, total in totals.items()}


def _direction(output: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """Return random directions of an output whose covariance is the curvature of each example's loss.

    For cross-entropy of logits `[n, classes, ...]`, the mean over positions, it is diag(p) - p pᵀ.
    """
    signs = torch.randint(0, 2, output.shape, generator=generator, device=output.device).to(output) * 2 - 1
    if not classes:
        return signs
    share = output.softmax(1)
    drawn = share.sqrt() * signs
    return (drawn - share * drawn.sum(1, keepdim=True)) / max(output[0, 0].numel(), 1) ** 0.5


def _rounding(module: nn.Module, weight: Quantizer | None, inputs: Quantizer | None) -> nn.Module:
    """Return a module that shares its tensors with another and rounds."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    set_quantizers(twin, weight, inputs)
    return twin.eval()


def _squared(layer: nn.Module, calls: Sequence[tuple[Tensor, Tensor, Tensor]], examples: int) -> float:
    """Return the sum over examples of the squared first-order change of their output along its direction.

    Where the batch is not the first axis it is the square of the sum over examples: the same on average,
    since directions are independent with mean zero.
    """
    total: Tensor | int = 0
    with torch.no_grad():
        for x, y, slope in calls:
            terms = ((layer(x) - y) * slope).double()
            total = total + terms.reshape(examples if len(terms) % examples == 0 else 1, -1).sum(1)
    return float(torch.as_tensor(total).square().sum())
