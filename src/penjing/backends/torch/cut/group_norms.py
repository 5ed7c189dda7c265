"""GroupNorm in the place of BatchNorm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from penjing.backends.torch.check import copy_module
from penjing.backends.torch.hooks import hooked
from penjing.backends.torch.observe.batch_statistics import find_batchnorms
from penjing.backends.torch.structure.history import record_step
from penjing.backends.torch.structure.pass_through import set_submodule
from penjing.backends.torch.tensors import evaluating, to_inputs
from penjing.core.backend import Arrays


def count_values_by_channel(model: nn.Module, example: Arrays) -> dict[str, int]:
    """Return for each BatchNorm layer that runs how many values each channel of one example has in it."""
    found: dict[str, int] = {}

    def watch(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[name] = given[0][0, 0].numel()

    with hooked(find_batchnorms(model), watch), evaluating(model), torch.no_grad():
        model(*to_inputs(model, tuple(x[:1] for x in example)))
    return found


def replace_batchnorms(model: nn.Module, groups: Mapping[str, int]) -> nn.Module:
    """Return a copy with GroupNorm for some BatchNorm layers, whose history says so.

    Scales and shifts are taken over; a layer that stands in several places stays one.

    Args:
        model: in any mode.
        groups: number of groups of each, by the layer's name; divides its channels.
    """
    result = copy_module(model)
    layers = find_batchnorms(result)
    new = {id(layers[name]): _group_norm(layers[name], count) for name, count in groups.items()}
    for name, module in [*result.named_modules(remove_duplicate=False)]:
        if id(module) in new:
            set_submodule(result, name, new[id(module)])
    record_step(result, model, {"group_norm": dict(groups)})
    return result


def _group_norm(layer: nn.Module, groups: int) -> nn.GroupNorm:
    made = nn.GroupNorm(groups, layer.num_features, layer.eps, layer.affine)
    if layer.affine:
        made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)
