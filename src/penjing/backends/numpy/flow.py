"""Which channels of a net go together, and the net without some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.structure.coupling import Coupling, Labels, fixed
from penjing.backends.numpy.evaluate import evaluate
from penjing.backends.numpy.net import Array, Node, NumpyNet
from penjing.core.backend import Arrays, Group, Groups
from penjing.core.errors import Refused, nearest

Kept = Mapping[str, NDArray[np.int64]]
UNITS_FIX = "pass the numbers of the units that stay, as numpy.flatnonzero of a mask gives them"


@dataclass(frozen=True)
class Step:
    """One node as a rule sees it.

    Attributes:
        taken: labels of the values that the node takes, along axis 1; other axes hold no channels.
        shape: of the first of these values.
    """

    coupling: Coupling
    node: Node
    tensors: Mapping[str, Array]
    taken: list[Labels]
    shape: tuple[int, ...]

    def unite(self, first: Labels, second: Labels, reason: str) -> None:
        """Make the channels at equal positions one."""
        self.coupling.unite(first, second, reason)

    def made(self) -> Labels:
        """Return the channels that rows of the weight make, each with its bias."""
        rows = len(self.tensors["weight"])
        out = self.coupling.axis(self.node.name, "weight", 0, rows, maker=True)
        if "bias" in self.tensors:
            self.unite(out, self.coupling.axis(self.node.name, "bias", 0, rows), "its bias is fixed")
        return out

    def consumed(self) -> Labels:
        """Return the columns of the weight; channels of all blocks together in a grouped convolution."""
        columns = self.coupling.axis(self.node.name, "weight", 1, len(self.taken[0]))
        self.unite(self.taken[0], columns, "its input is fixed")
        self.coupling.consume(columns)
        return columns


def find_groups(net: NumpyNet, example: Arrays) -> Groups:
    """Carry labels through the net and gather the groups."""
    coupling, values = Coupling(), evaluate(net, example)
    labels: dict[str, Labels] = {name: fixed(values[name].shape[1]) for name in net.inputs}
    for node in net.nodes:
        taken, shape = [labels[name] for name in node.inputs], values[node.inputs[0]].shape
        step = Step(coupling, node, net.tensors.get(node.name, {}), taken, shape)
        labels[node.name] = RULES[node.op](step)
    coupling.freeze(labels[net.nodes[-1].name], "is an output of the model")
    return coupling.groups()


def conv2d(step: Step) -> Labels:
    """Rows of the weight make channels; its columns consume them, unless each channel has its own filter."""
    channels, groups = step.taken[0], step.node.whole("groups")
    out = step.made()
    if groups == 1:
        step.consumed()
    elif groups == len(channels):
        step.unite(
            np.repeat(channels, len(out) // groups), out, "is a depthwise convolution of fixed channels"
        )
    else:
        for atoms in (step.consumed(), out):
            step.coupling.tie_blocks(atoms, np.arange(len(atoms)) // (len(atoms) // groups))
    return out


def linear(step: Step) -> Labels:
    """Rows of the weight make features, its columns consume them."""
    out = step.made()
    step.consumed()
    return out


def batchnorm(step: Step) -> Labels:
    """Every tensor has one number a channel."""
    for name, array in step.tensors.items():
        own = step.coupling.axis(step.node.name, name, 0, len(array))
        step.unite(step.taken[0], own, "is normalized with fixed channels")
    return step.taken[0]


def add(step: Step) -> Labels:
    """Channels at equal positions are one."""
    step.unite(step.taken[0], step.taken[1], "meets a tensor whose channels are fixed")
    return step.taken[0]


def concat(step: Step) -> Labels:
    """One after the other."""
    return np.concatenate(step.taken)


def flatten(step: Step) -> Labels:
    """A channel becomes as many features as it has pixels."""
    return np.repeat(step.taken[0], int(np.prod(step.shape[2:])))


def through(step: Step) -> Labels:
    """Every channel by itself."""
    return step.taken[0]


RULES: Mapping[str, Callable[[Step], Labels]] = {
    "conv2d": conv2d,
    "linear": linear,
    "batchnorm": batchnorm,
    "add": add,
    "concat": concat,
    "flatten": flatten,
} | dict.fromkeys(("relu", "max_pool", "avg_pool", "global_mean"), through)
"""How every operator passes labels on."""


def cut(net: NumpyNet, groups: Groups, kept: Kept) -> NumpyNet:
    """Return the net with only the units `kept` of the groups named there.

    Raises:
        Refused: an unknown group, or units that are not sorted, none, outside the group, or unequally many
            from its blocks.
    """
    by_name = {group.name: group for group in groups.groups}
    masks: dict[tuple[str, str], dict[tuple[int, int], NDArray[np.bool_]]] = {}
    for name, units in kept.items():
        group = _checked(by_name, name, np.asarray(units))
        stays = np.zeros(group.size + 1, bool)
        stays[units] = True
        stays[-1] = True  # the number -1, an index of another group
        for slot in group.slots:
            axes = masks.setdefault((slot.layer, slot.tensor), {})
            key = (slot.axis, len(slot.units))
            axes[key] = axes.get(key, np.ones(len(slot.units), bool)) & stays[slot.units]
    tensors = {
        layer: {name: _sliced(array, masks.get((layer, name), {})) for name, array in own.items()}
        for layer, own in net.tensors.items()
    }
    return NumpyNet(net.inputs, tuple(_resized(node, net, tensors) for node in net.nodes), tensors)


def _checked(by_name: Mapping[str, Group], name: str, units: NDArray[Any]) -> Group:
    if name not in by_name:
        raise Refused(
            "must name a group of the net", value=repr(name), place="keep", fix=nearest(name, by_name)
        )
    group = by_name[name]
    place, shown = f"keep({name})", units.tolist()
    if units.ndim != 1 or not units.size or units.dtype.kind not in "iu":
        raise Refused("must be whole numbers, at least one", value=shown, place=place, fix=UNITS_FIX)
    if (np.diff(units) <= 0).any() or units[0] < 0 or units[-1] >= group.size:
        raise Refused(
            f"must be sorted, different and from 0 to {group.size - 1}",
            value=shown,
            place=place,
            fix=UNITS_FIX,
        )
    counts = np.bincount(group.blocks[units], minlength=int(group.blocks.max()) + 1)
    if len(set(counts.tolist())) > 1:
        raise Refused(
            "every block must keep equally many units",
            value=counts.tolist(),
            place=place,
            fix="keep as many of each block in `group.blocks`",
        )
    return group


def _sliced(array: Array, axes: Mapping[tuple[int, int], NDArray[np.bool_]]) -> Array:
    """Keep some indices of some axes; a mask longer than axis 1 counts the channels of all blocks."""
    rows = axes.get((0, len(array)), np.ones(len(array), bool))
    if array.ndim == 1:
        return array[rows]
    columns = next((mask for (axis, _), mask in axes.items() if axis == 1), np.ones(array.shape[1], bool))
    blocks = len(columns) // array.shape[1]
    parts = zip(np.split(array, blocks), np.split(rows, blocks), np.split(columns, blocks), strict=True)
    return np.concatenate([block[row][:, column] for block, row, column in parts])


def _resized(node: Node, net: NumpyNet, tensors: Mapping[str, Mapping[str, Array]]) -> Node:
    """A depthwise convolution has as many blocks as channels; other nodes stay as they are."""
    if not is_depthwise(node, net):
        return node
    multiple = len(net.tensors[node.name]["weight"]) // node.whole("groups")
    groups = len(tensors[node.name]["weight"]) // multiple
    return replace(node, attributes={**node.attributes, "groups": groups})


def is_depthwise(node: Node, net: NumpyNet) -> bool:
    """Tell whether a node is a convolution with a filter of its own for every channel."""
    if node.op != "conv2d" or node.whole("groups") == 1:
        return False
    return bool(net.tensors[node.name]["weight"].shape[1] == 1)
