"""A captured graph run as if some of its units did not exist, at full width.

What the cut has to equal. Operators that sum over channels get zeros for those that go; operators that take
statistics of channels (means, norms, LayerNorm) see only those that are left. Everything else treats each
channel by itself and may compute what it likes for one that nobody reads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from penjing.backends.torch.graph.flow import Flow
from penjing.backends.torch.graph.steps import Value, operator_name

_SUMS = {"addmm": (1,), "baddbmm": (1,), "addmv": (1,), "einsum": (1,)} | dict.fromkeys(
    (
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "matmul",
        "mm",
        "bmm",
        "mv",
        "dot",
        "scaled_dot_product_attention",
    ),
    (0,),
)
"""Operators that sum over channels, and the arguments in which zeros take a channel out of the sum."""

_STATISTICS = frozenset(
    {
        "layer_norm",
        "rms_norm",
        "group_norm",
        "mean",
        "sum",
        "amax",
        "amin",
        "prod",
        "var",
        "std",
        "logsumexp",
        "norm",
        "linalg_vector_norm",
        "any",
        "all",
        "cosine_similarity",
        "batch_norm",
        "instance_norm",
    }
)
"""Operators whose result depends on which channels there are."""


class MaskedRun(fx.Interpreter):  # type: ignore[misc]
    """Runs a captured graph at full width without the units that go."""

    def __init__(self, flow: Flow, stays: NDArray[np.bool_]) -> None:
        super().__init__(flow.capture.program.graph_module, graph=flow.capture.graph)
        self._flow, self._stays = flow, stays

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; take what goes out of sums and statistics."""
        name = operator_name(n.target) if n.op == "call_function" else ""
        if name in _SUMS and n in self._flow.values:
            return self._with_zeros(n, _SUMS[name])
        if name in _STATISTICS and n in self._flow.values and not self._by_channel(n, name):
            return self._on_what_is_left(n, name)
        return super().run_node(n)

    def _by_channel(self, n: fx.Node, name: str) -> bool:
        """Tell of a normalization whether it treats every channel by itself, with statistics that it has."""
        if name == "batch_norm":
            return n.args[5] is not True
        return name == "group_norm" and n.args[1] == self._flow.values[n.args[0]].shape[1]

    def _gone(self, node: fx.Node) -> list[tuple[int, Tensor]]:
        """Return the axes of a node's value that lose channels, and which indices stay."""
        value = self._flow.values.get(node)
        if not isinstance(value, Value):
            return []
        found = []
        length = self.env[node].shape
        for axis in range(len(value.shape)):
            stays = self._stays[self._flow.labels(node, axis)]
            if not stays.all():
                # A batch merged into an axis may be another one than the captured.
                found.append((axis, torch.from_numpy(np.resize(stays, length[axis]))))
        return found

    def _with_zeros(self, n: fx.Node, places: tuple[int, ...]) -> Any:
        nodes = [a for place in places for a in _nodes(n.args[place])]
        plain = {a: self.env[a] for a in nodes}
        try:
            for a in nodes:
                for axis, stays in self._gone(a):
                    shape = [-1 if i == axis else 1 for i in range(self.env[a].ndim)]
                    self.env[a] = self.env[a].masked_fill(~stays.to(plain[a].device).reshape(shape), 0)
            return super().run_node(n)
        finally:
            self.env.update(plain)

    def _on_what_is_left(self, n: fx.Node, name: str) -> Any:
        plain = {a: self.env[a] for a in n.all_input_nodes}
        gone = {a: self._gone(a) for a in plain}
        if not any(gone.values()):
            return super().run_node(n)
        full = self._result_shape(n)
        for a, axes in gone.items():
            for axis, stays in axes:
                self.env[a] = self.env[a].index_select(axis, _indices(stays, plain[a]))
        try:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if name in ("layer_norm", "rms_norm"):
                rank = len(args[1])
                args = (args[0], list(args[0].shape[args[0].ndim - rank :]), *args[2:])
            result = n.target(*args, **kwargs)
        finally:
            self.env.update(plain)
        return self._scattered(n, result, full)

    def _result_shape(self, n: fx.Node) -> list[int]:
        return list(super().run_node(n).shape)

    def _scattered(self, n: fx.Node, result: Tensor, full: list[int]) -> Tensor:
        """Put results back to where they are at full width."""
        for axis, length in enumerate(full):
            if result.shape[axis] != length:
                stays = self._stays[self._flow.labels(n, axis)]
                wide = result.new_zeros([*result.shape[:axis], length, *result.shape[axis + 1 :]])
                result = wide.index_copy(
                    axis, _indices(torch.from_numpy(np.resize(stays, length)), wide), result
                )
        return result


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _indices(stays: Tensor, like: Tensor) -> Tensor:
    return torch.nonzero(stays).reshape(-1).to(like.device)
