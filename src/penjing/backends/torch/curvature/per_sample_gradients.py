"""Gradients of weights for every example by itself, from one backward pass over a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from penjing.backends.torch.hooks import hooked
from penjing.backends.torch.tensors import evaluating

Calls = dict[str, list[tuple[Tensor, Tensor]]]


def explain_unsupported(module: nn.Module) -> str:
    """Say why a module's weight has no gradient by example here; empty where it has."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
        return ""
    return "gradients by example are known for linear layers and for convolutions of one or two dimensions"


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """Yield what fills with the inputs and outputs of modules, call by call, while the context lasts."""
    calls: Calls = defaultdict(list)

    def record(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        calls[name].append((inputs[0].detach(), output))
        # What follows gets an alias, so that an operator that works in place leaves the output alone.
        return output.view_as(output)

    with hooked(modules, after=record):
        yield calls


def per_sample_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    scalar: Callable[[Any], Tensor],
) -> dict[str, Tensor]:
    """Return for every example of a batch the gradient of its own term by the weight of each module.

    In evaluation mode, where examples do not see each other: the gradient by a layer's output belongs to one
    example, and the product with its inputs is that by the weight.

    Args:
        model: modes are put back.
        modules: of `model`, by name, such that `explain_unsupported` has nothing against them.
        inputs: tensors of one batch.
        scalar: of the model's output; the sum of one term for each example.

    Returns:
        By module `[examples, *weight.shape]`; zeros where the term does not depend on it.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> per_sample_gradients(net, {"0": net[0]}, (x,), lambda output: output.sum())["0"].tolist()
    [[[1.0, 2.0]], [[3.0, 4.0]]]
    """
    with evaluating(model), torch.enable_grad(), recording(modules) as calls:
        total = scalar(model(*inputs))
    outputs = [y for made in calls.values() for _, y in made]
    found = iter(torch.autograd.grad(total, outputs, allow_unused=True))
    examples, gradients = len(inputs[0]), {}
    for name, module in modules.items():
        weight = module.weight
        sums = weight.new_zeros(examples, *weight.shape)
        for x, _ in calls[name]:
            slope = next(found)
            if slope is not None:
                sums += by_weight(module, x, slope).view_as(sums)
        gradients[name] = sums
    return gradients


def by_weight(module: nn.Module, x: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient by a module's weight for each example, from its input and that by its output.

    Args:
        module: linear, or a convolution of one or two dimensions.
        x: `[examples, ..., in]`, or `[examples, in, *size]`.
        slope: of the output's shape.

    Returns:
        `[examples, out, in / groups * kernel]`.
    """
    if isinstance(module, nn.Linear):
        n, columns, rows = len(x), x.shape[-1], slope.shape[-1]
        return slope.reshape(n, -1, rows).transpose(1, 2) @ x.reshape(n, -1, columns)
    n, groups = len(x), module.groups
    seen = unfold_input(module, x)
    seen = seen.view(n, groups, -1, seen.shape[-1])
    slope = slope.reshape(n, groups, -1, seen.shape[-1])
    return slope @ seen.transpose(2, 3)


def unfold_input(module: nn.Module, x: Tensor) -> Tensor:
    """Return what output positions of a convolution are computed from, `[examples, in * kernel, positions]`.

    Args:
        module: of one or two dimensions.
        x: `[examples, in, *size]`.
    """
    if x.ndim == 3:
        x = x.unsqueeze(2)
    kernel, stride, dilation, padding = (_pair(v) for v in _geometry(module))
    x = functional.pad(x, padding, mode=_PAD.get(module.padding_mode, module.padding_mode))
    return functional.unfold(x, kernel, dilation=dilation, stride=stride)


_PAD = {"zeros": "constant"}


def _geometry(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return kernel, stride, dilation, and the padding of both ends as `functional.pad` takes it."""
    return module.kernel_size, module.stride, module.dilation, tuple(module._reversed_padding_repeated_twice)


def _pair(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(values) == 1:
        return (1, *values)
    return values
