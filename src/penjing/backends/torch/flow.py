"""Carry channel labels through a captured graph by the rules of its operators."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from penjing.arrays.coupling import Coupling, fixed
from penjing.backends.torch.capture import Capture, sizes, where
from penjing.backends.torch.rules import rule_for
from penjing.backends.torch.steps import Step, Value
from penjing.backends.torch.tensors import CONVOLUTIONS, tensors_of
from penjing.core.backend import Groups


@dataclass
class Flow:
    """A capture with the labels of every value, and the coupling that they were collected in."""

    capture: Capture
    coupling: Coupling
    values: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TorchGroups(Groups):
    """Groups together with the labelled graph that they came from, which `keep` needs."""

    flow: Flow | None = None


def label(model: nn.Module, captured: Capture) -> TorchGroups:
    """Propagate labels through the graph and gather the groups."""
    flow = Flow(captured, Coupling())
    makers = _makers(model)
    first_name: dict[int, str] = {}
    alias = {name: first_name.setdefault(id(t), name) for name, t in tensors_of(model).items()}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            if node.users:
                flow.values[node] = _placeholder(flow, node, alias, makers)
        elif node.op == "output":
            for dim in flow.values[captured.output].dims:
                flow.coupling.freeze(dim, "is an output of the model")
        else:
            flow.values[node] = _apply(flow, node)
    groups = flow.coupling.groups()
    return TorchGroups(groups.groups, groups.frozen, flow)


def _makers(model: nn.Module) -> dict[str, int]:
    """Return the weights that make channels, and along which axis."""
    kinds = (*CONVOLUTIONS, nn.Linear, nn.modules.conv._ConvTransposeNd)
    return {
        f"{name}.weight".lstrip("."): int(isinstance(module, nn.modules.conv._ConvTransposeNd))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def _placeholder(flow: Flow, node: Any, alias: dict[str, str], makers: dict[str, int]) -> Value:
    shape = sizes(node.meta["val"])
    if node.name not in flow.capture.tensors:
        return Value(tuple(fixed(n) for n in shape))
    name = alias[flow.capture.tensors[node.name]]
    layer, _, tensor = name.rpartition(".")
    dims = tuple(
        flow.coupling.axis(layer, tensor, axis, length, maker=axis == makers.get(name))
        for axis, length in enumerate(shape)
    )
    return Value(dims, (layer, tensor))


def _apply(flow: Flow, node: Any) -> Any:
    def resolve(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: flow.values.get(n, n))

    if node.op != "call_function":
        return None
    args, kwargs = resolve(node.args), resolve(node.kwargs)
    if node.target is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], list | tuple) else None
    value = node.meta.get("val")
    shape = _shape(value)
    step = Step(node, flow.coupling, tuple(args), dict(kwargs), shape)
    result = rule_for(node.target)(step)
    _check_lengths(node, result, shape)
    return result


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return sizes(value)
    if isinstance(value, list | tuple):
        return [_shape(v) for v in value]
    return None


def _check_lengths(node: Any, result: Any, shape: Any) -> None:
    if isinstance(result, Value):
        assert tuple(map(len, result.dims)) == tuple(shape), (where(node), result.dims, shape)
    elif isinstance(result, list):
        for part, part_shape in zip(result, shape, strict=True):
            _check_lengths(node, part, part_shape)
