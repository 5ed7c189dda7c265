"""What a rule sees of a graph: values with labels, one node at a time, and what it can ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from penjing.arrays.structure.coupling import Coupling
from penjing.arrays.structure.labels import Labels, Shape, aligned, fixed, on_axis, varying
from penjing.backends.torch.graph.capture import describe_node
from penjing.core.backend import Heads


@dataclass(frozen=True)
class Value:
    """A tensor in the graph.

    Attributes:
        shape: as in the captured batch.
        factors: labels of its elements, no two varying on the same axis; see `arrays.labels`.
        source: layer and tensor where it is a module's own tensor, unchanged.
        weight: whether it is made of the module's own tensors only.
        data: the numbers of a small constant of whole numbers (what indexes others).
    """

    shape: Shape
    factors: tuple[Labels, ...] = ()
    source: tuple[str, str] | None = None
    weight: bool = False
    data: NDArray[np.int64] | None = None

    def covering(self, axis: int) -> Labels | None:
        """Return the factor that varies on an axis, or None."""
        return next((f for f in self.factors if f.shape[axis] > 1), None)

    def along(self, axis: int) -> Labels | None:
        """Return the labels of one axis; None where they depend on another axis too, which is open yet."""
        factor = self.covering(axis)
        if factor is None:
            return fixed(self.shape[axis])
        return factor.reshape(-1) if len(varying(factor)) == 1 else None


@dataclass(frozen=True)
class Step:
    """One node with the labels of its arguments, as a rule sees it.

    `shape` is of the output, of each output where there are several, None where it is no tensor.
    """

    node: fx.Node
    coupling: Coupling
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: Any
    heads: Heads = "whole"

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def why(self, reason: str) -> str:
        """Return a reason with the operator and its source line."""
        return f"{reason} ({describe_node(self.node)})"

    def freeze(self, labels: Labels, reason: str) -> None:
        """Freeze labels."""
        self.coupling.freeze(labels.reshape(-1), self.why(reason))

    def freeze_axes(self, value: Value, axes: Iterable[int], reason: str) -> tuple[Labels, ...]:
        """Let no index of some axes go; return the factors that are left.

        What varies along these axes only is frozen. What varies along others too is one along these.
        """
        chosen = {axis % max(len(value.shape), 1) for axis in axes}
        left = []
        for factor in value.factors:
            inside = chosen.intersection(varying(factor))
            if inside == set(varying(factor)):
                self.freeze(factor, reason)
                continue
            left.append(self.tied(factor, inside, reason))
        return tuple(left)

    def tied(self, factor: Labels, axes: Iterable[int], reason: str) -> Labels:
        """Unite a factor along some axes; return it without them."""
        for axis in sorted(axes):
            first = factor.take([0], axis)
            self.unite(np.broadcast_to(first, factor.shape), factor, reason)
            factor = first
        return factor

    def unite(self, first: Labels | None, second: Labels | None, reason: str) -> None:
        """Unite labels; what meets a fixed coordinate is frozen; what is open yet (None) waits."""
        if first is not None and second is not None:
            self.coupling.unite(first.reshape(-1), second.reshape(-1), self.why(reason))

    def value(self, factors: Iterable[Labels], shape: Shape | None = None, *, weight: bool = False) -> Value:
        """Return an output value, its factors collapsed; a unit that is all of it stays."""
        shape = self.shape if shape is None else shape
        found = []
        for factor in map(self.coupling.collapse, factors):
            if varying(factor):
                found.append(factor)
            elif self.coupling.holds(factor).any():
                self.freeze(factor, "would be left with nothing")
        return Value(shape, self._apart(found), weight=weight)

    def _apart(self, factors: list[Labels]) -> tuple[Labels, ...]:
        """Freeze factors that vary on the same axis: two numberings of channels on one axis.

        Copies that an axis was expanded to give way to real channels.
        """
        real = [f for f in factors if not self.coupling.free(f)]
        taken = {axis for factor in real for axis in varying(factor)}
        for factor in (f for f in factors if self.coupling.free(f)):
            if taken.intersection(varying(factor)):
                self.freeze(factor, "is merged with another axis")
            else:
                real.append(factor)
                taken.update(varying(factor))
        return self._unmerged(real)

    def _unmerged(self, factors: list[Labels]) -> tuple[Labels, ...]:
        axes = [axis for factor in factors for axis in varying(factor)]
        shared = {axis for axis in axes if axes.count(axis) > 1}
        for factor in factors:
            if shared.intersection(varying(factor)):
                self.freeze(factor, "is merged with another axis")
        return tuple(f for f in factors if not shared.intersection(varying(f)))


Rule = Callable[[Step], Any]


@dataclass(frozen=True)
class Part:
    """A value on the axes of several: its factors there, and the axes on which it is not repeated."""

    factors: tuple[Labels, ...]
    full: frozenset[int]


def part(value: Value, axes: Sequence[int], rank: int) -> Part:
    """Put axis `i` of a value on axis `axes[i]` of `rank` axes."""
    full = frozenset(axes[i] for i, n in enumerate(value.shape) if n > 1)
    return Part(tuple(aligned(f, axes, rank) for f in value.factors), full)


def agree(step: Step, parts: Iterable[Part], reason: str) -> tuple[Labels, ...]:
    """Unite values that meet element by element, and return the labels of what comes of it.

    Labels of one axis meet labels of that axis. Labels that vary over several axes at once meet their like;
    where only one of these axes is shared, nothing is said until later unions settle which one counts.
    """
    result: Part | None = None
    for other in parts:
        result = other if result is None else _met(step, result, other, reason)
    return () if result is None else result.factors


def _met(step: Step, first: Part, second: Part, reason: str) -> Part:
    shared = first.full & second.full
    for a in first.factors:
        for b in second.factors:
            if varying(a) == varying(b):
                step.unite(a, b, reason)
    live: list[Labels] = []
    for mine, others in ((first, second), (second, first)):
        for factor in mine.factors:
            axes = set(varying(factor))
            met = any(axes.intersection(varying(f)) for f in others.factors)
            if axes <= shared and not met:
                step.freeze(factor, reason)
            else:
                live.append(factor)
    factors: list[Labels] = []
    for factor in sorted(live, key=lambda f: -len(varying(f))):
        if not any(set(varying(factor)).intersection(varying(f)) for f in factors):
            factors.append(factor)
    return Part(tuple(factors), first.full | second.full)


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
    """Return values without labels for an output shape."""
    if isinstance(shape, list):
        return [unlabelled(s) for s in shape]
    return None if shape is None else Value(shape)


def axis_labels(labels: Labels, axis: int, rank: int) -> tuple[Labels, ...]:
    """Return the factors of a value that is labelled along one axis; none where nothing is."""
    return (on_axis(labels, axis, rank),) if len(labels) > 1 and (labels >= 0).any() else ()


def operator_name(target: Callable[..., Any]) -> str:
    """Return the plain name of an operator: `add` for `aten.add_.Tensor`."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name: str = target._schema.name.split("::")[1]
        return name.rstrip("_") if not name.startswith("__") else name
    return str(getattr(target, "__name__", target))
