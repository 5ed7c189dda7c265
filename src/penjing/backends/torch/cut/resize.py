"""How the size arguments of operators follow a cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from penjing.backends.torch.graph.capture import BATCH
from penjing.backends.torch.graph.flow import Flow


@dataclass(frozen=True)
class Constant:
    """Numbers that an operator needs in the new graph, to become a tensor of the module."""

    values: NDArray[Any]


@dataclass(frozen=True)
class Scaled:
    """A size in the new graph: so many times the batch of this input, named by its placeholder."""

    batch: fx.Node
    times: int


Resized = Constant | tuple[Any, ...] | None
"""A constant in the place of a node; or target, arguments and perhaps keywords; or None to leave the node."""


@dataclass(frozen=True)
class Cut:
    """A labelled graph and which of its atoms stay (`Coupling.staying`)."""

    flow: Flow
    stays: NDArray[np.bool_]

    def kept(self, node: fx.Node, axis: int) -> NDArray[np.bool_]:
        """Return which indices along an axis of a node's value stay."""
        stays: NDArray[np.bool_] = self.stays[self.flow.labels(node, axis)]
        return stays

    def width(self, node: fx.Node, axis: int) -> int:
        """Return the size of an axis of a node's value after the cut, for the captured batch."""
        return int(self.kept(node, axis).sum())

    def rank(self, node: fx.Node) -> int:
        """Return the number of axes of a node's value."""
        return len(self.flow.values[node].shape)

    def size(self, node: fx.Node, axis: int, given: Any) -> Any:
        """Return the new size of an axis; -1 and sizes that no cut concerns stay."""
        kept = self.kept(node, axis)
        if kept.all() or (isinstance(given, int) and given == -1):
            return given
        if not isinstance(given, fx.Node):
            return int(kept.sum())
        inputs = [n for n in self.flow.capture.graph.nodes if n.name in self.flow.capture.inputs]
        batch = next(n for n in inputs if n.meta["val"].ndim)
        assert int(kept.sum()) % BATCH == 0
        return Scaled(batch, int(kept.sum()) // BATCH)


def _sizes(cut: Cut, node: fx.Node, given: Sequence[Any], offset: int = 0) -> list[Any]:
    """Rewrite the numbers of a size argument."""
    return [cut.size(node, axis + offset, n) for axis, n in enumerate(given)]


def _resize_first(cut: Cut, node: fx.Node) -> Resized:
    return node.target, (_sizes(cut, node, node.args[0]), *node.args[1:])


def _resize_second(cut: Cut, node: fx.Node) -> Resized:
    if not isinstance(node.args[1], list | tuple):  # view as another type
        return None
    return node.target, (node.args[0], _sizes(cut, node, node.args[1]), *node.args[2:])


def _resize_unflatten(cut: Cut, node: fx.Node) -> Resized:
    x, axis, given = node.args[:3]
    return node.target, (x, axis, _sizes(cut, node, given, axis % cut.rank(x)))


def _resize_slice(cut: Cut, node: fx.Node) -> Resized:
    given: list[Any] = [*node.args, *[0, None, None, 1][len(node.args) - 1 :]]
    x, axis, start, stop, stride = given
    axis %= cut.rank(x)
    kept = cut.kept(x, axis)
    if kept.all():
        return None
    if stride != 1:
        chosen = np.arange(len(kept))[slice(start, stop, stride)]
        return _selection(x, axis, kept, chosen)
    begin, end, _ = slice(start, stop).indices(len(kept))
    before = int(kept[:begin].sum())
    return node.target, (x, axis, before, before + int(kept[begin:end].sum()))


def _resize_row(cut: Cut, node: fx.Node) -> Resized:
    """Numbers in a row have gaps after a cut: those that stay become a constant."""
    kept = cut.kept(node, 0)
    if kept.all():
        return None
    with torch.no_grad():
        row = node.target(*node.args, **node.kwargs)
    return Constant(row.cpu().numpy()[kept])


def _selection(x: fx.Node, axis: int, kept: NDArray[np.bool_], chosen: NDArray[np.int64]) -> Resized:
    """Choose indices by their new numbers, leaving out what goes."""
    numbers = np.cumsum(kept) - 1
    return torch.ops.aten.index_select.default, (x, axis, Constant(numbers[chosen[kept[chosen]]]))


def _resize_narrow(cut: Cut, node: fx.Node) -> Resized:
    x, axis, start, length = node.args
    axis %= cut.rank(x)
    kept = cut.kept(x, axis)
    if kept.all():
        return None
    start %= len(kept)
    return node.target, (x, axis, int(kept[:start].sum()), int(kept[start : start + length].sum()))


def _resize_select(cut: Cut, node: fx.Node) -> Resized:
    x, axis, index = node.args
    axis %= cut.rank(x)
    kept = cut.kept(x, axis)
    return None if kept.all() else (node.target, (x, axis, int(kept[: index % len(kept)].sum())))


def _resize_index_select(cut: Cut, node: fx.Node) -> Resized:
    x, axis, index = node.args
    axis %= cut.rank(x)
    kept, data = cut.kept(x, axis), cut.flow.values[index].data
    return None if kept.all() else _selection(x, axis, kept, data.reshape(-1))


def _resize_index(cut: Cut, node: fx.Node) -> Resized:
    x, indices = node.args
    used = [axis for axis, i in enumerate(indices) if i is not None]
    kept = cut.kept(x, used[0])
    if len(used) > 1 or kept.all():
        return None
    return _selection(x, used[0], kept, cut.flow.values[indices[used[0]]].data)


def _resize_split(cut: Cut, node: fx.Node) -> Resized:
    x, axis = node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    parts = cut.flow.values[node]
    axis %= cut.rank(x)
    if cut.kept(x, axis).all():
        return None
    widths = [int(cut.stays[part.along(axis)].sum()) for part in parts]
    return torch.ops.aten.split_with_sizes.default, (x, widths, axis)


def _resize_pad(cut: Cut, node: fx.Node) -> Resized:
    x, amounts = node.args[0], list(node.args[1])
    for number in range(len(amounts) // 2):
        left, right = amounts[2 * number : 2 * number + 2]
        kept = cut.kept(node, cut.rank(x) - 1 - number)
        if left >= 0 and right >= 0:
            amounts[2 * number] = int(kept[:left].sum())
            amounts[2 * number + 1] = int(kept[len(kept) - right :].sum())
    return node.target, (x, amounts, *node.args[2:])


def _resize_convolution(cut: Cut, node: fx.Node) -> Resized:
    x, groups = node.args[0], node.args[6] if len(node.args) > 6 else 1
    if groups == 1 or groups != cut.flow.values[x].shape[1]:
        return None
    return node.target, (*node.args[:6], cut.width(x, 1), *node.args[7:])


def _resize_layer_norm(cut: Cut, node: fx.Node) -> Resized:
    x, shape = node.args[:2]
    first = cut.rank(x) - len(shape)
    return node.target, (x, [cut.width(x, first + i) for i in range(len(shape))], *node.args[2:])


def _resize_group_norm(cut: Cut, node: fx.Node) -> Resized:
    x, groups = node.args[:2]
    if groups != cut.flow.values[x].shape[1]:
        return None
    return node.target, (x, cut.width(x, 1), *node.args[2:])


def _resize_attention(cut: Cut, node: fx.Node) -> Resized:
    """Keep the scale of the width that the model was trained with."""
    q = node.args[0]
    kept = cut.kept(q, cut.rank(q) - 1)
    if kept.all() or node.kwargs.get("scale") is not None:
        return None
    return node.target, node.args, {**node.kwargs, "scale": 1 / math.sqrt(len(kept))}


RESIZE: dict[str, Callable[[Cut, fx.Node], Resized]] = {
    **dict.fromkeys(("zeros", "ones", "full"), _resize_first),
    **dict.fromkeys(("arange", "linspace"), _resize_row),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "new_zeros", "new_ones", "new_full"),
        _resize_second,
    ),
    "unflatten": _resize_unflatten,
    "slice": _resize_slice,
    "narrow": _resize_narrow,
    "select": _resize_select,
    "index_select": _resize_index_select,
    "index": _resize_index,
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"), _resize_split
    ),
    **dict.fromkeys(("pad", "constant_pad_nd"), _resize_pad),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        _resize_convolution,
    ),
    **dict.fromkeys(("layer_norm", "rms_norm"), _resize_layer_norm),
    "group_norm": _resize_group_norm,
    "scaled_dot_product_attention": _resize_attention,
}
"""How an operator's arguments follow a cut: target, arguments (and keywords), or None to leave the node."""
