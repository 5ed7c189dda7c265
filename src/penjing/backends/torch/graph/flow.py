"""Carry channel labels through a captured graph by the rules of its operators."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from penjing.arrays.structure.coupling import Coupling
from penjing.arrays.structure.labels import Labels, Shape, fixed, varying
from penjing.backends.torch.graph.capture import Capture, describe_node, read_shape
from penjing.backends.torch.graph.rules import rule_for
from penjing.backends.torch.graph.steps import Step, Value, axis_labels, values_in
from penjing.backends.torch.tensors import CONVOLUTIONS, tensors_of
from penjing.core.backend import Groups, Heads

_SMALL = 1 << 20
"""Most elements of a constant of whole numbers whose values are read."""


@dataclass
class Flow:
    """A capture with the labels of every value, and the coupling that they were collected in."""

    capture: Capture
    coupling: Coupling
    heads: Heads = "whole"
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def labels(self, node: fx.Node, axis: int) -> Labels:
        """Return the labels along one axis of a node's value."""
        labels: Labels | None = self.values[node].along(axis)
        assert labels is not None, describe_node(node)
        return labels


@dataclass(frozen=True)
class TorchGroups(Groups):
    """Groups together with the labelled graph that they came from, which `keep` needs."""

    flow: Flow | None = None


def label_channels(model: nn.Module, captured: Capture, heads: Heads = "whole") -> TorchGroups:
    """Propagate labels through the graph, again until nothing is open, and gather the groups.

    A walk unites what must be one. Where an axis was split into several, what is left must be a box, so its
    labels may vary along one of the new axes only; if later operators say nothing about which, it is the
    one that leaves most units.

    >>> from penjing.backends.torch.graph.capture import capture
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> groups = label_channels(net, capture(net, (np.zeros((1, 4), np.float32),)))
    >>> [(group.name, group.size) for group in groups.groups], dict(groups.frozen)
    ([('0', 8)], {'2': 'is an output of the model'})
    """
    flow = Flow(captured, Coupling(), heads)
    walker = _Walker(flow, model)
    while True:
        walker.walk()
        if flow.coupling.walked():
            continue
        if not _forced(flow):
            break
        flow.coupling.walked()
    groups = flow.coupling.groups()
    return TorchGroups(groups.groups, groups.frozen, flow)


def _forced(flow: Flow) -> bool:
    """Decide for labels that vary along several axes; tell whether there were any."""
    frozen = flow.coupling.frozen()
    seen: set[int] = set()
    for node, found in flow.values.items():
        for value in values_in(found):
            for factor in value.factors:
                axes = varying(factor)
                if len(axes) < 2:
                    continue
                atoms = set(factor[~frozen[factor]].tolist()) or set(factor[:1].reshape(-1).tolist())
                if seen.isdisjoint(atoms):
                    flow.coupling.force(factor, frozen, f"is split into several axes ({describe_node(node)})")
                seen |= atoms
    return bool(seen)


class _Walker:
    """Walks the nodes of a graph, also those that no output depends on: the module runs them."""

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        self._flow, self._tensors = flow, tensors_of(model)
        first: dict[int, str] = {}
        self._alias = {name: first.setdefault(id(t), name) for name, t in self._tensors.items()}
        self._makers = _makers(model)

    def walk(self) -> None:
        """Label every value once more, with what earlier walks united."""
        flow = self._flow
        flow.coupling.walk()
        flow.values.clear()
        for node in flow.capture.graph.nodes:
            if node.op == "placeholder":
                if node.users:
                    flow.values[node] = self._placeholder(node)
            elif node.op == "output":
                for value in values_in([flow.values[n] for n in flow.capture.outputs]):
                    for factor in value.factors:
                        flow.coupling.freeze(factor.reshape(-1), "is an output of the model")
            else:
                flow.values[node] = self._apply(node)

    def _placeholder(self, node: fx.Node) -> Value:
        capture, shape = self._flow.capture, read_shape(node.meta["val"])
        if node.name in capture.tensors:
            name = self._alias[capture.tensors[node.name]]
            layer, _, tensor = name.rpartition(".")
            made, axes = self._makers.get(name, (None, range(len(shape))))
            coupling, atoms = self._flow.coupling, [fixed(n) for n in shape]
            for axis in axes:
                atoms[axis] = coupling.axis(layer, tensor, axis, shape[axis], maker=axis == made)
            if made is not None and shape[made] == 1:
                coupling.freeze(atoms[made], "has a single channel")
            return self._own(node, shape, atoms, (layer, tensor), self._tensors[name])
        if node.name in capture.constants:
            fresh = self._flow.coupling.fresh
            atoms = [fresh(n, (node.name, axis)) for axis, n in enumerate(shape)]
            return self._own(node, shape, atoms, None, capture.constants[node.name][1])
        return Value(shape)

    def _own(
        self, node: fx.Node, shape: Shape, atoms: list[Labels], source: tuple[str, str] | None, tensor: Tensor
    ) -> Value:
        """A tensor of the module itself: every axis is labelled with its own atoms."""
        step = Step(node, self._flow.coupling, (), {}, shape)
        factors = [f for axis, a in enumerate(atoms) for f in axis_labels(a, axis, len(shape))]
        return Value(shape, step.value(factors).factors, source, weight=True, data=_numbers(tensor))

    def _apply(self, node: fx.Node) -> Any:
        def resolve(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda n: self._flow.values.get(n, n))

        if node.op != "call_function":
            return None
        args, kwargs = resolve(node.args), resolve(node.kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], list | tuple) else None
        shape = _shape(node.meta.get("val"))
        step = Step(node, self._flow.coupling, tuple(args), dict(kwargs), shape, self._flow.heads)
        result = rule_for(node.target)(step)
        _check_shapes(node, result, shape)
        return result


def _makers(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the weights of known layers: the axis that makes channels, and all axes that hold channels."""
    kinds: tuple[tuple[Any, int, tuple[int, ...]], ...] = (
        (CONVOLUTIONS, 0, (0, 1)),
        (nn.modules.conv._ConvTransposeNd, 1, (0, 1)),
        (nn.Linear, 0, (0, 1)),
        ((nn.Embedding, nn.EmbeddingBag), 1, (1,)),
    )
    return {
        f"{name}.weight".lstrip("."): (made, axes)
        for name, module in model.named_modules()
        for kind, made, axes in kinds
        if isinstance(module, kind)
    }


def _numbers(tensor: Tensor) -> NDArray[np.int64] | None:
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    readable = whole and tensor.device.type != "meta" and tensor.numel() <= _SMALL
    return tensor.detach().cpu().numpy().astype(np.int64) if readable else None


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return read_shape(value)
    if isinstance(value, list | tuple):
        return [_shape(v) for v in value]
    return None


def _check_shapes(node: fx.Node, result: Any, shape: Any) -> None:
    if isinstance(result, Value):
        assert result.shape == tuple(shape), (describe_node(node), result.shape, shape)
        for factor in result.factors:
            pairs = zip(factor.shape, shape, strict=True)
            assert all(n in (1, m) for n, m in pairs), (describe_node(node), factor.shape, shape)
    elif isinstance(result, list):
        for part, part_shape in zip(result, shape, strict=True):
            _check_shapes(node, part, part_shape)
