"""BatchNorm folded into the layer before it, so that one product with one weight is left to round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from penjing.backends.torch.observe.lockstep import record_usage
from penjing.backends.torch.tensors import CONVOLUTIONS, evaluating, select_output, to_inputs
from penjing.core.backend import Arrays

TOLERANCE = 1e-3
"""Largest difference of the outputs that folding may make, relative to their largest magnitude."""


def fold_batchnorm(model: nn.Module, example: Arrays, covers: Callable[[str], bool]) -> dict[str, str]:
    """Fold BatchNorm layers in place; return by name the layers that took one, and which.

    A BatchNorm layer is folded into the convolution or linear layer whose output it takes, if both run once
    and the model computes the same afterwards; an identity stands in its place. Jacob et al. 2018,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section
    3.2.

    Args:
        model: in any mode; computes in evaluation mode what it computed before.
        example: inputs of one batch.
        covers: tells which layers may be touched.

    >>> import numpy as np
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    >>> fold_batchnorm(net, (np.ones((1, 3, 8, 8), np.float32),), lambda layer: True)
    {'0': '1'}
    """
    inputs = to_inputs(model, tuple(x[:1] for x in example))
    before = _output(model, inputs)
    size = float(before.abs().max().clamp(min=1e-30))
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if _can_take(module) and covers(name)]
    normal = [name for name, module in modules.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = record_usage(model, [*layers, *normal], inputs)
    folded = {}
    for name in layers:
        call = found[name]
        if not call.batchnorm or call.times != 1 or found[call.batchnorm].times != 1:
            continue
        layer, batchnorm = modules[name], modules[call.batchnorm]
        if batchnorm.running_mean is None:
            continue
        old = layer.weight.detach().clone(), layer.bias
        _fold(layer, batchnorm)
        _replace(model, call.batchnorm, nn.Identity())
        if float((_output(model, inputs) - before).abs().max()) <= TOLERANCE * size:
            folded[name] = call.batchnorm
        else:
            # Something else takes the layer's output too.
            _replace(model, call.batchnorm, batchnorm)
            layer.weight.data.copy_(old[0])
            layer.bias = old[1]
    return folded


def _can_take(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, *CONVOLUTIONS)


def _output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with evaluating(model), torch.no_grad():
        return select_output(model(*inputs)).double()


def _fold(layer: nn.Module, batchnorm: nn.Module) -> None:
    with torch.no_grad():
        mean, var = batchnorm.running_mean.double(), batchnorm.running_var.double()
        factor = (var + batchnorm.eps).rsqrt()
        offset = torch.zeros_like(mean)
        if batchnorm.affine:
            factor, offset = factor * batchnorm.weight.double(), batchnorm.bias.double()
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
        weight = layer.weight.double() * factor.reshape(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight.copy_(weight)
        made = ((bias - mean) * factor + offset).to(layer.weight.dtype)
        layer.bias = nn.Parameter(made, requires_grad=layer.weight.requires_grad)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, local = name.rpartition(".")
    setattr(model.get_submodule(parent), local, module)
