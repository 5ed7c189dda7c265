"""A captured graph as data: what a module computes, without its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from penjing.backends.torch.graph.capture import Capture, require_dynamic
from penjing.backends.torch.stored.graph_json import FORMAT, dtype_name, encode, write_operator
from penjing.backends.torch.tensors import tensors_of
from penjing.core.errors import Refused

CONSTANT = "_penjing_constant_"
_TRAINING = {
    "aten.batch_norm.default": 5,
    "aten.dropout.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.alpha_dropout.default": 2,
}
"""Where an operator takes whether it trains."""

_DROPPED = ("_assert", "sym_constrain_range")
"""Operators without a result, which check what the capture assumed."""


def describe_graph(model: nn.Module, captured: Capture) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a module's graph as JSON data, and the tensors that its state dict does not hold.

    The data: `inputs` (names), `tensors` (shape, type and role of every tensor by name), `nodes` (operator,
    arguments; a node is named by its place) and `outputs`. BatchNorm and dropout follow the mode of the
    module that is made of it.

    Args:
        captured: of this module; for any batch size.

    Raises:
        Refused: the graph takes one batch size only, or holds what is no operator of aten.

    >>> import numpy as np
    >>> from penjing.backends.torch.graph.capture import capture
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> data, constants = describe_graph(net, capture(net, (np.zeros((1, 4), np.float32),)))
    >>> [node["op"] for node in data["nodes"]], constants
    (['aten.linear.default', 'aten.relu.default'], {})
    """
    require_dynamic(captured)
    writer = _Writer(model, captured)
    writer.walk(captured.graph, captured.program.graph_module)
    output = next(n for n in reversed(captured.graph.nodes) if n.op == "output").args[0]
    data = {
        "format": FORMAT,
        "inputs": list(captured.names),
        "tensors": writer.tensors,
        "nodes": writer.nodes,
        "outputs": encode(list(output), writer.reference),
    }
    if not all(isinstance(entry, dict) for entry in data["outputs"]):
        raise Refused(
            "every output must be computed",
            value=repr(data["outputs"])[:80],
            place="model",
            fix="return tensors from forward, no constants or None",
        )
    return data, writer.constants


class _Writer:
    def __init__(self, model: nn.Module, captured: Capture) -> None:
        self._captured = captured
        self.nodes: list[dict[str, Any]] = []
        self.constants: dict[str, Tensor] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        self._named = tensors_of(model)
        self._values: dict[fx.Node, Any] = {}
        first: dict[int, str] = {}
        saved = model.state_dict(keep_vars=True)
        for name, tensor in self._named.items():
            if first.setdefault(id(tensor), name) != name:
                self._add(name, tensor, "tied")
                self.tensors[name]["to"] = first[id(tensor)]
            elif name in saved:
                self._add(name, tensor, "parameter" if isinstance(tensor, nn.Parameter) else "buffer")
        self._first = first

    def _add(self, name: str, tensor: Tensor, role: str) -> None:
        self.tensors[name] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype), "role": role}

    def _constant(self, name: str, tensor: Tensor) -> dict[str, str]:
        """Take a tensor along that the state dict does not hold."""
        if name not in self.tensors:
            self._add(name, tensor, "constant")
            self.constants[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}

    def walk(self, graph: fx.Graph, owner: fx.GraphModule) -> None:
        for node in graph.nodes:
            if node.op == "placeholder" and node not in self._values:
                self._values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self._call(node, owner)

    def reference(self, node: fx.Node) -> Any:
        if node not in self._values:
            raise Refused(
                "a stored graph must consist of known operators of aten",
                value=str(node.target),
                place="model",
                fix="take control flow out of forward",
            )
        return self._values[node]

    def _placeholder(self, node: fx.Node) -> Any:
        captured = self._captured
        if node.name in captured.inputs:
            return {"input": captured.inputs.index(node.name)}
        if node.name in captured.tensors:
            tensor = self._named[captured.tensors[node.name]]
            name = self._first[id(tensor)]
            return {"tensor": name} if name in self.tensors else self._constant(name, tensor)
        return self._constant(f"{CONSTANT}{len(self.constants)}", captured.constants[node.name][1])

    def _call(self, node: fx.Node, owner: fx.GraphModule) -> None:
        if _name(node.target).startswith(_DROPPED) and not node.users:
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._values[node] = self._inline(node, owner)
            return
        if node.target.__name__ == "getitem" and isinstance(self._values.get(node.args[0]), list):
            self._values[node] = self._values[node.args[0]][node.args[1]]
            return
        name = write_operator(node.target)
        args = encode(list(node.args), self.reference)
        entry: dict[str, Any] = {"op": name, "args": args}
        if node.kwargs:
            entry["kwargs"] = {key: encode(value, self.reference) for key, value in node.kwargs.items()}
        position = _TRAINING.get(name)
        if position is not None and len(args) > position and args[position] is False:
            args[position] = {"training": True}
        if name == "aten.batch_norm.default":
            entry["rank"] = node.args[0].meta["val"].ndim
        self._values[node] = {"node": len(self.nodes)}
        self.nodes.append(entry)

    def _inline(self, node: fx.Node, owner: fx.GraphModule) -> list[Any]:
        """Write the inside of a block without gradients (or with autocast off); return its outputs."""
        modes = [a for a in node.args if not isinstance(a, fx.Node)]
        inner = next((a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        harmless = _name(node.target) == "wrap_with_set_grad_enabled" or (
            _name(node.target) == "wrap_with_autocast" and False in modes
        )
        if inner is None or not harmless:
            raise Refused(
                "a stored graph must consist of known operators of aten",
                value=_name(node.target),
                place="model",
                fix="take control flow and autocast out of forward",
            )
        module = getattr(owner, inner.target)
        given = [self._values[a] for a in node.args[node.args.index(inner) + 1 :]]
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._values.update(zip(places, given, strict=True))
        self.walk(module.graph, module)
        output = next(n for n in reversed(module.graph.nodes) if n.op == "output").args[0]
        outputs = output if isinstance(output, list | tuple) else [output]
        return [encode(value, self.reference) for value in outputs]


def _name(target: Callable[..., Any]) -> str:
    return str(getattr(target, "__name__", target)).rpartition("::")[2]
