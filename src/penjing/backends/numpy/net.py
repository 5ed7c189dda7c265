"""A small network as data: nodes in the order of evaluation, and the tensors of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused, nearest

Array = NDArray[np.float32]
Number = int | float


@dataclass(frozen=True)
class Operator:
    """What a node of one kind needs.

    Attributes:
        tensors: names of the tensors it must have, and `optional` of those it may have.
        attributes: names and defaults.
        inputs: how many values it takes; None: two or more.
        kind: the field's word for the layer, where it is one.
    """

    tensors: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    attributes: Mapping[str, Number] = field(default_factory=dict)
    inputs: int | None = 1
    kind: str = ""


_WINDOW: Mapping[str, Number] = {"kernel": 2, "stride": 2, "padding": 0}

OPERATORS: Mapping[str, Operator] = {
    "conv2d": Operator(("weight",), ("bias",), {"stride": 1, "padding": 0, "groups": 1}, kind="conv"),
    "linear": Operator(("weight",), ("bias",), kind="linear"),
    "batchnorm": Operator(
        ("weight", "bias", "running_mean", "running_var"), attributes={"eps": 1e-5}, kind="batchnorm"
    ),
    "relu": Operator(),
    "add": Operator(inputs=2),
    "concat": Operator(inputs=None),
    "max_pool": Operator(attributes=_WINDOW),
    "avg_pool": Operator(attributes=_WINDOW),
    "global_mean": Operator(),
    "flatten": Operator(),
}
"""Every operator; how each is computed, labelled and exported stands in `evaluate`, `flow` and `export`."""

_RANKS = {"conv2d": 4, "linear": 2, "batchnorm": 1}


@dataclass(frozen=True)
class Node:
    """One operator applied to named values; its own value, and its layer, go by the node's name.

    `attributes` left out take the defaults of `OPERATORS`: `stride`, `padding`, `groups`, `kernel` are
    integers that hold for both axes of an image, `eps` is added to a variance.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Number] = field(default_factory=dict)

    def __getitem__(self, attribute: str) -> Number:
        return self.attributes.get(attribute, OPERATORS[self.op].attributes[attribute])

    def whole(self, attribute: str) -> int:
        """Return an attribute that is an integer."""
        return int(self[attribute])


@dataclass(frozen=True, eq=False)
class NumpyNet:
    """A network on images `[n, channels, height, width]` or rows `[n, features]`, in single precision.

    Attributes:
        inputs: names of the values that a caller gives.
        nodes: every node after those whose values it takes; the last one is the output.
        tensors: for every layer its tensors, weights as `[out, in / groups, *kernel]`.

    Raises:
        Refused: an unknown operator or attribute, a value used before it is made, a name given twice, or a
            tensor that is missing, unknown or of another rank.

    >>> net = NumpyNet(("x",), (Node("fc", "linear", ("x",)),), {"fc": {"weight": np.eye(2)}})
    >>> net.tensors["fc"]["weight"].dtype
    dtype('float32')
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    tensors: dict[str, dict[str, Array]]

    def __post_init__(self) -> None:
        owned = {
            layer: {name: np.array(array, np.float32) for name, array in tensors.items()}
            for layer, tensors in self.tensors.items()
        }
        object.__setattr__(self, "tensors", owned)
        _require(
            bool(self.inputs and self.nodes), "must have inputs and nodes", "none", "net", "name one of each"
        )
        known = list(self.inputs)
        for node in self.nodes:
            _check_node(node, known)
            _check_tensors(node, owned.get(node.name, {}))
            known.append(node.name)
        stray = sorted(set(owned) - {node.name for node in self.nodes})
        _require(not stray, "tensors must belong to a node", stray, "net", "name them as their node")

    def node(self, name: str) -> Node:
        """Return the node of this name.

        Raises:
            Refused: there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise Refused(
            "must name a node of the net",
            value=repr(name),
            place="layer",
            fix=nearest(name, [node.name for node in self.nodes]),
        )


def _check_node(node: Node, known: list[str]) -> None:
    if node.op not in OPERATORS:
        raise Refused(
            "must have a known operator",
            value=repr(node.op),
            place=node.name,
            fix=nearest(node.op, OPERATORS),
        )
    operator = OPERATORS[node.op]
    _require(node.name not in known, "names of values must differ", repr(node.name), "net", "rename the node")
    for value in node.inputs:
        _require(
            value in known,
            "needs values that were made before",
            repr(value),
            node.name,
            nearest(value, known),
        )
    enough = len(node.inputs) >= 2 if operator.inputs is None else len(node.inputs) == operator.inputs
    _require(
        enough,
        f"needs {operator.inputs or 'two or more'} inputs, as {node.op} takes",
        len(node.inputs),
        node.name,
        "name as many values in `inputs`",
    )
    for attribute, number in node.attributes.items():
        _require(
            attribute in operator.attributes,
            f"must have attributes of {node.op} only",
            repr(attribute),
            node.name,
            nearest(attribute, operator.attributes) if operator.attributes else "leave it out",
        )
        least = 0 if attribute in ("padding", "eps") else 1
        kind = "number" if attribute == "eps" else "whole number"
        fits = isinstance(number, float | int if attribute == "eps" else int) and not isinstance(number, bool)
        _require(
            fits and number >= least,
            f"must be a {kind} of at least {least}",
            number,
            f"{node.name}.{attribute}",
            f"use {operator.attributes[attribute]}, the default, or more",
        )


def _check_tensors(node: Node, tensors: Mapping[str, Array]) -> None:
    operator = OPERATORS[node.op]
    missing = sorted(set(operator.tensors) - set(tensors))
    unknown = sorted(set(tensors) - set(operator.tensors) - set(operator.optional))
    _require(
        not missing, f"{node.op} must have all its tensors", f"none for {missing}", node.name, "add them"
    )
    _require(not unknown, f"must have tensors of {node.op} only", unknown, node.name, "leave the others out")
    for name, array in tensors.items():
        rank = _RANKS[node.op] if name == "weight" else 1
        _require(
            array.ndim == rank, f"must have {rank} axes", array.shape, f"{node.name}.{name}", "reshape it"
        )
        rows = len(next(iter(tensors.values())))
        _require(
            len(array) == rows,
            f"must have a row for each of {rows} channels",
            len(array),
            f"{node.name}.{name}",
            "give tensors of one layer the same length",
        )


def _require(holds: bool, rule: str, value: object, place: str, fix: str) -> None:
    if not holds:
        raise Refused(rule, value=value, place=place, fix=fix)
