"""A module from a captured graph: what stands in for code that has its widths written into it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from penjing.backends.torch.cut.exported import NAMES, Code, ExportedNet
from penjing.backends.torch.cut.resize import RESIZE, Constant, Cut, Scaled
from penjing.backends.torch.graph.capture import require_dynamic
from penjing.backends.torch.graph.flow import Flow
from penjing.backends.torch.graph.steps import operator_name
from penjing.backends.torch.tensors import CONVOLUTIONS, device_of
from penjing.core.errors import Refused


def build_exported_net(
    model: nn.Module, sliced: nn.Module, flow: Flow, kept: Mapping[str, NDArray[np.int64]]
) -> ExportedNet:
    """Build the stand-in: the graph with its sizes rewritten, on a module whose tensors are sliced.

    Args:
        model: the module before the cut, whose graph `flow` holds.
        sliced: a copy with sliced tensors; becomes part of the result.
        flow: the labelled graph.
        kept: units that stay, by group.

    Raises:
        Refused: the graph holds what cannot be written as code, or works for one batch size only.
    """
    require_dynamic(flow.capture)
    builder = _Builder(model, Cut(flow, flow.coupling.staying(kept)))
    graph, constants = builder.build()
    code = graph.python_code("self")
    foreign = sorted(set(code.globals) - {*NAMES, "fx_pytree", "pytree"})
    if foreign:
        raise Refused(
            "the graph must be one that can be written as code",
            value=", ".join(foreign),
            place="model",
            fix="replace these functions in forward by torch operators",
        )
    net = ExportedNet(sliced, Code(code.src), flow.capture.names, flow.capture.structure)
    for name, tensor in constants.items():
        net.register_buffer(name, tensor.clone(), persistent=False)
    return net


class _Builder:
    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.model, self.cut, self.flow = model, cut, cut.flow
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.new: dict[fx.Node, fx.Node] = {}

    def build(self) -> tuple[fx.Graph, dict[str, Tensor]]:
        capture = self.flow.capture
        inputs = {name: self.graph.placeholder(f"input_{i}") for i, name in enumerate(capture.inputs)}
        for node in capture.graph.nodes:
            if node.op == "placeholder":
                if node.name in inputs:
                    self.new[node] = inputs[node.name]
                elif node.users:
                    self.new[node] = self._tensor(node)
            elif node.op == "call_function":
                self.new[node] = self._call(node)
            elif node.op == "get_attr":
                raise Refused(
                    "the graph must be one that can be written as code",
                    value=str(node.target),
                    place="model",
                    fix="remove control flow and gradient modes from forward",
                )
        returned = next(n for n in reversed(capture.graph.nodes) if n.op == "output").args[0]
        returned = fx.node.map_arg(returned, self.new.get)
        self.graph.output(returned if capture.structure else returned[0])
        self.graph.eliminate_dead_code(is_impure_node=_is_impure)
        return self.graph, self.constants

    def _tensor(self, node: fx.Node) -> fx.Node:
        capture = self.flow.capture
        if node.name in capture.tensors:
            return self.graph.get_attr(capture.tensors[node.name])
        name, tensor = capture.constants[node.name]
        owner, _, attribute = name.rpartition(".")
        kept = [self.cut.kept(node, axis) for axis in range(tensor.ndim)]
        if self._has(owner, attribute) and all(stays.all() for stays in kept):
            return self.graph.get_attr(name)
        for axis, stays in enumerate(kept):
            tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(stays)).to(tensor.device))
        return self._constant(tensor)

    def _constant(self, tensor: Tensor) -> fx.Node:
        names = (f"_penjing_constant_{number}" for number in itertools.count())
        constant = next(n for n in names if n not in self.constants and not hasattr(self.model, n))
        self.constants[constant] = tensor
        return self.graph.get_attr(constant)

    def _has(self, owner: str, attribute: str) -> bool:
        try:
            return hasattr(self.model.get_submodule(owner), attribute)
        except AttributeError:
            return False

    def _call(self, node: fx.Node) -> fx.Node:
        module = self._as_module(node)
        if module is not None:
            return self.graph.call_module(module, (self.new[node.args[0]],))
        name = operator_name(node.target)
        if isinstance(node.target, torch._ops.OpOverload) and name in RESIZE:
            resized = RESIZE[name](self.cut, node)
            if isinstance(resized, Constant):
                return self._argument(resized)
            if resized is not None:
                target, args, *kwargs = resized
                found = fx.node.map_aggregate((args, *(kwargs or [node.kwargs])), self._argument)
                return self.graph.call_function(target, *found)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.new.get)
        return self.graph.call_function(node.target, self._with_mode(name, args), dict(kwargs))

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.new[argument]
        if isinstance(argument, Constant):
            return self._constant(torch.from_numpy(argument.values).to(device_of(self.model)))
        if isinstance(argument, Scaled):
            batch = self.graph.call_function(torch.ops.aten.sym_size.int, (self.new[argument.batch], 0))
            return self.graph.call_function(operator.mul, (batch, argument.times))
        return argument

    def _with_mode(self, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        """Let functional dropout and BatchNorm, captured in evaluation mode, follow the module's mode."""
        position = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "batch_norm": 5}.get(name)
        if position is None or args[position] is not False:
            return tuple(args)
        return (*args[:position], self.graph.get_attr("training"), *args[position + 1 :])

    def _as_module(self, node: fx.Node) -> str | None:
        """Return the name of the module that does exactly what a node does."""
        name = operator_name(node.target)
        if name == "dropout":
            return self._dropout(node)
        if name not in ("conv1d", "conv2d", "conv3d", "linear", "batch_norm"):
            return None
        tensors = self.flow.capture.tensors
        weight = tensors.get(getattr(node.args[3 if name == "batch_norm" else 1], "name", ""), "")
        owner = weight.rpartition(".")[0]
        module = self.model.get_submodule(owner) if owner else None
        if (
            module is None
            or module._forward_hooks
            or module._forward_pre_hooks
            or not _does(module, node, name)
        ):
            return None
        held = {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
        own = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        used = [
            own.get(tensors[a.name]) for a in node.args[1:] if isinstance(a, fx.Node) and a.name in tensors
        ]
        bias_missing = getattr(module, "bias", None) is not None and len(used) < 2
        return owner if all(id(t) in held for t in used) and not bias_missing else None

    def _dropout(self, node: fx.Node) -> str | None:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        name = stack[-1][0] if stack else ""
        try:
            module = self.model.get_submodule(name) if name else None
        except AttributeError:
            return None
        if module is None or type(module) is not nn.Dropout or module.inplace:
            return None
        return name if module.p == node.args[1] else None


def _does(module: nn.Module, node: fx.Node, name: str) -> bool:
    if name == "linear":
        return type(module) is nn.Linear
    if name == "batch_norm":
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return type(module) in kinds and node.args[5] is False and module.eps == node.args[7]
    if type(module) not in CONVOLUTIONS or module.padding_mode != "zeros":
        return False
    spatial = len(module.kernel_size)
    defaults = ([1] * spatial, [0] * spatial, [1] * spatial, 1)
    stride, padding, dilation, groups = (*node.args[3:], *defaults[max(len(node.args) - 3, 0) :])[:4]
    same_padding = padding == module.padding if isinstance(padding, str) else tuple(padding) == module.padding
    same_steps = tuple(stride) == module.stride and tuple(dilation) == module.dilation
    return bool(same_steps and same_padding and groups == module.groups)


def _is_impure(node: fx.Node) -> bool:
    """In-place operators matter though nobody reads their result; assertions on sizes do not."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_module" or (schema is not None and bool(schema.is_mutable))
