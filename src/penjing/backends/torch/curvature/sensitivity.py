"""How the loss depends on gates and on the curvature: derivatives beyond the gradient of the weights."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from penjing.backends.torch.hooks import Before, hooked
from penjing.backends.torch.losses import LossFunction, resolve_loss
from penjing.backends.torch.observe.observe import group_by_layer
from penjing.backends.torch.tensors import (
    device_of,
    evaluating,
    find_layer,
    select_output,
    to_inputs,
    to_numpy,
)
from penjing.core.backend import GateGradients, Sample
from penjing.core.errors import Refused
from penjing.core.task import Batch

_Taken = dict[str, list[Tensor | None]]


def gate_gradients(model: nn.Module, layers: Sequence[str], sample: Sample) -> Iterator[GateGradients]:
    """Yield, batch by batch, the derivatives by gates on the inputs of layers, for every example.

    In evaluation mode, one backward pass a batch; the loss is a mean over the batch, so that an example's
    own derivative is its share times the number of examples. Memory: the inputs of all these layers for one
    batch, and their gradients. A channel is the second axis of a convolution's input, the last of others.

    Args:
        model: modes are restored after every batch.
        layers: names of modules.
        sample: data and loss; the walk ends with the split where it has fewer batches.

    Raises:
        Refused: an unknown layer, or an unknown loss.
    """
    modules = {name: find_layer(model, name) for name in layers}
    function = resolve_loss(sample.loss)
    for batch in _batches(sample):
        taken: _Taken = defaultdict(list)
        with hooked(modules, _tap(taken)):
            value = _loss(model, function, batch)
        yield _reduced(modules, taken, value, len(batch[1]))


def _tap(taken: _Taken) -> Before:
    """Make a hook that hands a layer an alias of its input: its gradient is that through this layer only."""

    def hook(name: str, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        calls = taken[name]
        given = [x for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor)]
        if len(given) != 1 or not inputs:
            # A gate on one of several inputs (query, key, value) is not a gate on the layer's input.
            calls.append(None)
            return inputs, named
        x = given[0]
        alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)
        calls.append(alias)
        return tuple(alias if argument is x else argument for argument in inputs), named

    return hook


def _reduced(modules: dict[str, nn.Module], taken: _Taken, value: Tensor, examples: int) -> GateGradients:
    taken = {name: calls for name, calls in taken.items() if calls and all(x is not None for x in calls)}
    inputs = [x for calls in taken.values() for x in calls]
    found = iter(torch.autograd.grad(value, inputs, allow_unused=True) if inputs else ())
    sums: dict[str, NDArray[np.float64]] = {}
    squares: dict[str, NDArray[np.float64]] = {}
    for name, calls in taken.items():
        terms = [_by_channel(modules[name], x, next(found), examples) for x in calls]
        if not any(term is None for term in terms):
            together = torch.cat(terms, 1)
            sums[name] = to_numpy(together.sum(1))
            squares[name] = to_numpy(together.square().sum(1))
    return GateGradients(examples, sums, squares)


def _by_channel(module: nn.Module, x: Tensor, gradient: Tensor | None, examples: int) -> Tensor | None:
    """Return `x dL/dx` as [examples, positions, channels], None where the batch is not the first axis."""
    if not x.ndim or len(x) % examples:
        return None
    axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else x.ndim - 1
    gradient = torch.zeros_like(x) if gradient is None else gradient
    product = (x.detach().double() * gradient.double() * examples).movedim(axis, -1)
    return product.reshape(examples, -1, product.shape[-1])


def hessian_diagonals(model: nn.Module, sample: Sample) -> Iterator[dict[str, dict[str, NDArray[Any]]]]:
    """Yield, batch by batch, Hutchinson's estimate of the diagonal of the Hessian of the mean loss.

    `z * Hz` with random signs z (Hutchinson 1990; Yao et al. 2021, AdaHessian) for every parameter of every
    layer: unbiased, with the off-diagonal entries as noise, so that many batches are wanted. In evaluation
    mode; memory for the graph of the gradient. The gradient of the user's own autograd functions that are
    marked as differentiable once counts as constant.

    Args:
        model: modes and flags are restored after every batch.
        sample: data and loss; its seed also draws the signs.

    Raises:
        Refused: an operator of the model has no second derivative.
    """
    function, rng = resolve_loss(sample.loss), np.random.default_rng(sample.seed)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for batch in _batches(sample):
        flags = [p.requires_grad for p in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            found = _signed_products(_loss(model, function, batch), parameters, rng)
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        yield group_by_layer(model, found)


def _signed_products(
    value: Tensor, parameters: list[nn.Parameter], rng: np.random.Generator
) -> dict[int, Tensor | None]:
    signs = [torch.from_numpy(rng.choice((-1.0, 1.0), tuple(p.shape))).to(p) for p in parameters]
    try:
        gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        curved = [(g, z) for g, z in zip(gradients, signs, strict=True) if g is not None and g.requires_grad]
        products: Sequence[Tensor | None] = [None] * len(parameters)
        if curved:
            products = torch.autograd.grad(
                [g for g, _ in curved], parameters, [z for _, z in curved], allow_unused=True
            )
    except RuntimeError as error:
        raise Refused(
            "the loss must be twice differentiable",
            value=str(error).splitlines()[0][:200],
            place="score hessian",
            fix="use another score, such as score='l2'",
        ) from error
    return {id(p): None if h is None else h * z for p, h, z in zip(parameters, products, signs, strict=True)}


def _batches(sample: Sample) -> Iterator[Batch]:
    return itertools.islice(sample.split.batches(sample.size, sample.seed), sample.batches)


def _loss(model: nn.Module, function: LossFunction, batch: Batch) -> Tensor:
    inputs, targets = batch
    # The fused attention kernels have no second derivative.
    with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        output = select_output(model(*to_inputs(model, inputs)))
        return function(output, torch.from_numpy(np.array(targets)).to(device_of(model)))
