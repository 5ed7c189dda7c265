"""What a rule sees of a graph: values with labels, one node at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from penjing.arrays.coupling import Coupling, Labels, fixed
from penjing.backends.torch.capture import where

CONSUMERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
             "linear", "matmul", "mm", "addmm")  # fmt: skip
"""Operators that sum over channels with a weight: what a cut channel does not reach any more."""


@dataclass(frozen=True)
class Value:
    """A tensor in the graph: labels of each axis, and whose tensor it is where it is a module's own."""

    dims: tuple[Labels, ...]
    source: tuple[str, str] | None = None


@dataclass(frozen=True)
class Step:
    """One node with the labels of its arguments, as a rule sees it.

    `shape` is of the output, of each output where there are several, None where it is no tensor.
    """

    node: Any
    coupling: Coupling
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: Any

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def why(self, reason: str) -> str:
        """Return a reason with the operator and its source line."""
        return f"{reason} ({where(self.node)})"

    def freeze(self, labels: Labels, reason: str) -> Labels:
        """Freeze an axis; return labels of a fixed axis of the same length."""
        self.coupling.freeze(labels, self.why(reason))
        return fixed(len(labels))

    def unite(self, first: Labels, second: Labels, reason: str) -> None:
        """Unite two axes; what meets a fixed coordinate is frozen for the reason."""
        self.coupling.unite(first, second, self.why(reason))


Rule = Callable[[Step], Any]


def operator_name(target: Any) -> str:
    """Return the plain name of an operator: `add` for `aten.add_.Tensor`."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name: str = target._schema.name.split("::")[1]
        return name.rstrip("_") if not name.startswith("__") else name
    return str(getattr(target, "__name__", target))


def values_in(arguments: Any) -> list[Value]:
    """Return every tensor value among arguments, however nested."""
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [v for a in arguments for v in values_in(a)]
    return []


def unlabelled(shape: Any) -> Any:
    """Return values of fixed axes for an output shape."""
    if isinstance(shape, list):
        return [unlabelled(s) for s in shape]
    return None if shape is None else Value(tuple(fixed(n) for n in shape))
