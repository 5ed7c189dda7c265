"""How the size arguments of operators follow a cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from penjing.backends.torch.flow import Flow


@dataclass(frozen=True)
class Cut:
    """A labelled graph and which of its atoms stay (`Coupling.staying`)."""

    flow: Flow
    stays: NDArray[np.bool_]

    def kept(self, node: Any, axis: int) -> NDArray[np.bool_]:
        """Return which indices along an axis of a node's value stay."""
        stays: NDArray[np.bool_] = self.stays[self.flow.values[node].dims[axis]]
        return stays

    def width(self, node: Any, axis: int) -> int:
        """Return the size of a fixed-size axis of a node's value after the cut."""
        return int(self.kept(node, axis).sum())


def _sizes(cut: Cut, node: Any, given: Any, offset: int = 0) -> list[Any]:
    """Rewrite the numbers of a size argument; -1 and symbolic sizes stay."""
    return [
        n if isinstance(n, fx.Node) or n == -1 else cut.width(node, axis + offset)
        for axis, n in enumerate(given)
    ]


def _resize_first(cut: Cut, node: Any) -> Any:
    return node.target, (_sizes(cut, node, node.args[0]), *node.args[1:])


def _resize_second(cut: Cut, node: Any) -> Any:
    return node.target, (node.args[0], _sizes(cut, node, node.args[1]), *node.args[2:])


def _resize_unflatten(cut: Cut, node: Any) -> Any:
    x, axis, given = node.args[:3]
    rank = len(cut.flow.values[x].dims)
    return node.target, (x, axis, _sizes(cut, node, given, axis % rank))


def _resize_slice(cut: Cut, node: Any) -> Any:
    given: list[Any] = [*node.args, *[0, None, None][len(node.args) - 1 :]]
    x, axis, start, stop, *rest = given
    axis %= len(cut.flow.values[x].dims)
    kept = cut.kept(x, axis)
    if kept.all():
        return None
    begin, end, _ = slice(start, stop).indices(len(kept))
    before = int(kept[:begin].sum())
    return node.target, (x, axis, before, before + int(kept[begin:end].sum()), *rest)


def _resize_split(cut: Cut, node: Any) -> Any:
    x, axis = node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    parts = cut.flow.values[node]
    axis %= len(parts[0].dims)
    if cut.kept(x, axis).all():
        return None
    widths = [int(cut.stays[part.dims[axis]].sum()) for part in parts]
    return torch.ops.aten.split_with_sizes.default, (x, widths, axis)


def _resize_pad(cut: Cut, node: Any) -> Any:
    x, amounts = node.args[0], list(node.args[1])
    rank = len(cut.flow.values[x].dims)
    for number in range(len(amounts) // 2):
        left, right = amounts[2 * number : 2 * number + 2]
        kept = cut.kept(node, rank - 1 - number)
        if left >= 0 and right >= 0:
            amounts[2 * number] = int(kept[:left].sum())
            amounts[2 * number + 1] = int(kept[len(kept) - right :].sum())
    return node.target, (x, amounts, *node.args[2:])


def _resize_convolution(cut: Cut, node: Any) -> Any:
    x, groups = node.args[0], node.args[6] if len(node.args) > 6 else 1
    width = cut.width(x, 1)
    if groups == 1 or groups != len(cut.flow.values[x].dims[1]):
        return None
    return node.target, (*node.args[:6], width, *node.args[7:])


RESIZE: dict[str, Callable[[Cut, Any], Any]] = {
    **dict.fromkeys(("zeros", "ones", "full"), _resize_first),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "new_zeros", "new_ones",
                     "new_full"), _resize_second),
    "unflatten": _resize_unflatten,
    "slice": _resize_slice,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _resize_split),
    **dict.fromkeys(("pad", "constant_pad_nd"), _resize_pad),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _resize_convolution),
}  # fmt: skip
"""How an operator's size arguments follow a cut: target and arguments, or None to leave the node."""
