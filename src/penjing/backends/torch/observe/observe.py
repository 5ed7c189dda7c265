"""Running a module: outputs, inputs and outputs of layers, gradients of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.hooks import After, hooked
from penjing.backends.torch.losses import LossFunction, resolve_loss
from penjing.backends.torch.tensors import (
    device_of,
    evaluating,
    find_layer,
    select_output,
    to_inputs,
    to_numpy,
)
from penjing.core.backend import Arrays
from penjing.core.errors import Refused
from penjing.core.task import Batch, Split

Observed = dict[str, tuple[NDArray[Any], NDArray[Any]]]


def run(model: nn.Module, inputs: Arrays) -> NDArray[Any]:
    """Return the model's output for one batch, in evaluation mode; modes are restored.

    Raises:
        Refused: the model returned no tensor.
    """
    with evaluating(model), torch.no_grad():
        return to_numpy(select_output(model(*to_inputs(model, inputs))))


def observe(model: nn.Module, layers: Sequence[str], batches: Iterator[Batch]) -> Iterator[Observed]:
    """Yield the first input and the output of layers, batch by batch, in evaluation mode.

    A layer that is called several times for a batch gives its calls joined along the batch.

    Raises:
        Refused: an unknown layer, or one that the model does not call as a module.
    """
    modules = {name: find_layer(model, name) for name in layers}
    for inputs, _ in batches:
        seen: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {name: [] for name in layers}
        with hooked(modules, after=_recorder(seen)):
            run(model, inputs)
        yield {name: _joined(name, calls) for name, calls in seen.items()}


def _recorder(calls: Mapping[str, list[tuple[NDArray[Any], NDArray[Any]]]]) -> After:
    def record(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        calls[name].append((to_numpy(inputs[0]), to_numpy(select_output(output))))

    return record


def _joined(name: str, calls: list[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    if not calls:
        raise Refused(
            "an observed layer must be called as a module",
            value=name,
            place="observe",
            fix="leave the layer out with only(...)",
        )
    shapes = {x.shape[1:] for x, _ in calls}
    if len(shapes) > 1:
        raise Refused(
            "the calls of an observed layer must have inputs of one shape",
            place=name,
            value=sorted(shapes),
            fix="leave the layer out with only(...)",
        )
    if len(calls) == 1:
        return calls[0]
    return np.concatenate([x for x, _ in calls]), np.concatenate([y for _, y in calls])


def gradients(
    model: nn.Module, split: Split, loss: str | LossFunction, batches: int, size: int, seed: int
) -> Iterator[dict[str, dict[str, NDArray[Any]]]]:
    """Yield, batch by batch, the gradient of the mean loss for every parameter of every layer.

    In evaluation mode, so that BatchNorm and dropout do not add noise. Frozen parameters
    (`requires_grad=False`) get gradients too and are frozen again afterwards; `.grad` is never touched.
    Parameters that the loss does not depend on have gradient 0.

    Args:
        model: modes and flags are restored after every batch.
        split: data; the walk ends with it where it has fewer batches.
        loss: as of `penjing.backends.torch.losses.resolve_loss`.
        batches: at most this many.
        size: examples a batch.
        seed: of the order of examples.
    """
    function = resolve_loss(loss)
    for inputs, targets in itertools.islice(split.batches(size, seed), batches):
        yield group_by_layer(model, _gradient(model, function, inputs, targets))


def _gradient(
    model: nn.Module, function: LossFunction, inputs: Arrays, targets: NDArray[Any]
) -> dict[int, Tensor | None]:
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    with evaluating(model), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            output = select_output(model(*to_inputs(model, inputs)))
            value = function(output, torch.from_numpy(np.array(targets)).to(device_of(model)))
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
    return {id(p): g for p, g in zip(parameters, found, strict=True)}


def group_by_layer(
    model: nn.Module, gradient: dict[int, Tensor | None]
) -> dict[str, dict[str, NDArray[Any]]]:
    """Arrange what was found for parameters (by id, None for nothing) by layer and tensor name."""
    result: dict[str, dict[str, NDArray[Any]]] = {}
    for name, module in model.named_modules():
        own = {}
        for tensor, parameter in module.named_parameters(recurse=False):
            found = gradient.get(id(parameter))
            own[tensor] = to_numpy(torch.zeros_like(parameter) if found is None else found)
        if own:
            result[name] = own
    return result
