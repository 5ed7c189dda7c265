"""A captured graph in a form that more can be done with.

`with torch.no_grad()` and `torch.autocast(enabled=False)` inside forward become graphs of their own. Without
parameters in them (rotary position tables, masks) they mean what their operators mean, and no more, and are
written out. A view becomes a reshape: whether memory allows a view depends on the kernel that computed the
tensor (attention), which may be another one for another batch.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def inline_nested(module: fx.GraphModule, parameters: set[str]) -> fx.Graph:
    """Return a copy of a captured module's graph with its harmless nested graphs written out.

    Args:
        module: torch.export's graph module; unchanged.
        parameters: names of placeholders that are trained. A region without gradients that depends on one of
            them stays as it is: written out, it would train.
    """
    trained: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.name in parameters or any(source in trained for source in node.all_input_nodes):
            trained.add(node)
    writer = _Writer(trained)
    writer.copy(module, {})
    writer.graph.eliminate_dead_code(is_impure_node=lambda n: n.op != "get_attr")
    return writer.graph


def _body(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """Return the node of a nested graph and its arguments, where only the surroundings are special."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function":
        return None
    if name == "wrap_with_set_grad_enabled":
        return node.args[1], node.args[2:]
    if name == "wrap_with_autocast" and node.args[2] is False:
        return node.args[4], node.args[5:]
    return None


class _Writer:
    def __init__(self, trained: set[fx.Node]) -> None:
        self.graph = fx.Graph()
        self._trained = trained

    def copy(self, module: fx.GraphModule, known: dict[fx.Node, Any]) -> Any:
        """Copy the nodes of a module and return what it returns; `known` is what its placeholders are."""
        new = dict(known)

        def resolve(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda n: new[n])

        for node in module.graph.nodes:
            body = _body(node)
            if node in new:
                continue
            if node.op == "output" and known:
                return resolve(node.args[0])
            if body is not None and not self._trains(node):
                inner = getattr(module, body[0].target)
                places = [n for n in inner.graph.nodes if n.op == "placeholder"]
                new[node] = self.copy(inner, dict(zip(places, map(resolve, body[1]), strict=True)))
            elif node.target is operator.getitem and isinstance(new[node.args[0]], list | tuple):
                new[node] = new[node.args[0]][node.args[1]]
            else:
                new[node] = self.graph.node_copy(node, lambda n: new[n])
                if node.op == "placeholder":
                    # The capture knows them by name; `input`, a builtin of Python, would get a number.
                    new[node].name = node.name
                if node.target is torch.ops.aten.view.default:
                    new[node].target = torch.ops.aten.reshape.default
        return None

    def _trains(self, node: fx.Node) -> bool:
        grads = node.target.__name__ == "wrap_with_set_grad_enabled" and node.args[0] is False
        return grads and any(source in self._trained for source in node.all_input_nodes)
