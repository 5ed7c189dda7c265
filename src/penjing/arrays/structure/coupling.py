"""Which channels can only go together: what a walk through a graph collects about them.

A walk labels every tensor with atoms (`arrays.labels`) and tells a `Coupling` what the operators demand:
atoms that are one, atoms that stay, axes that make or consume channels. The classes of united atoms are the
units that go or stay as one; `arrays.units` gathers them into groups. Knows no framework.
(The dependency graph of Fang et al. 2023, "DepGraph", on single channels instead of whole layers.)

What one operator demands may depend on what a later one does: an axis that is split into heads and positions
can go by heads or by positions. So a graph may be walked several times. Unions last; everything else is what
the last walk said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.structure.labels import Labels, collapsed, fixed, units_left, varying
from penjing.arrays.structure.units import Axis, Demands, Solution, solve
from penjing.core.backend import Groups

__all__ = ["Coupling", "Labels", "fixed"]


@dataclass
class _Store:
    """Class of every atom, and whether a tensor has an atom of that class; with room to grow.

    The last entry is always free, so that the label -1 finds -1 and False.
    """

    count: int = 0
    classes: Labels = field(default_factory=lambda: fixed(1))
    real: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1, bool))

    def grow(self, length: int, *, real: bool = False) -> Labels:
        before, self.count = self.count, self.count + length
        if self.count >= len(self.classes):
            classes, marks = fixed(2 * self.count + 1), np.zeros(2 * self.count + 1, bool)
            classes[:before], marks[:before] = self.classes[:before], self.real[:before]
            self.classes, self.real = classes, marks
        atoms = np.arange(before, self.count, dtype=np.int64)
        self.classes[atoms], self.real[atoms] = atoms, real
        return atoms


class Coupling:
    """Collects atoms, unions, consumptions and freezes; `groups` solves them once at the end."""

    def __init__(self) -> None:
        self._store = _Store()
        self._axes: dict[tuple[str, str, int, int], Axis] = {}
        self._fresh: dict[object, Labels] = {}
        self._edges: list[tuple[Labels, Labels]] = []
        self._kept: list[tuple[Labels, str]] = []
        self._demands = Demands()
        self._solution: Solution | None = None

    def fresh(self, length: int, key: object = None) -> Labels:
        """Return new atoms that no tensor makes, for example channels of zeros from padding.

        With a key, the same ones whenever they are asked for again.
        """
        if key is None:
            return self._store.grow(length)
        if key not in self._fresh:
            self._fresh[key] = self._store.grow(length)
        return self._fresh[key]

    def axis(self, layer: str, tensor: str, axis: int, length: int, *, maker: bool = False) -> Labels:
        """Return the atoms of one axis of one tensor, the same ones whenever it is asked for again.

        `length` differs from the tensor's own where the axis counts something else: the input axis of a
        grouped convolution counts the channels of all blocks. `maker` says that the axis is the output of
        a layer (weight rows of a convolution), which names groups and reports.
        """
        key = (layer, tensor, axis, length)
        if key not in self._axes:
            self._axes[key] = Axis(layer, tensor, axis, self._store.grow(length, real=True), maker)
        return self._axes[key].atoms

    def make(self, atoms: Labels) -> None:
        """Mark atoms of a weight's axis as outputs of its layer, as `maker` of `axis` does."""
        self._demands.made.append(atoms[atoms >= 0])

    def unite(self, first: Labels, second: Labels, reason: str) -> None:
        """Make the atoms at equal positions one; an atom that meets -1 is frozen for the reason."""
        assert first.shape == second.shape, (first.shape, second.shape)
        both = (first >= 0) & (second >= 0)
        self._edges.append((first[both], second[both]))
        if not both.all():
            self.freeze(np.where(both, -1, np.maximum(first, second)), reason)

    def consume(self, atoms: Labels) -> None:
        """Mark atoms of a weight's axis as inputs: without the unit, these columns go."""
        self._demands.consumed.append(atoms[atoms >= 0])

    def eat(self, atoms: Labels) -> None:
        """Mark atoms that a sum without a weight uses up."""
        self._demands.eaten.append(atoms[atoms >= 0])

    def freeze(self, atoms: Labels, reason: str) -> None:
        """Keep the units of these atoms forever; the first reason given for a unit counts."""
        atoms = atoms[atoms >= 0]
        if atoms.size:
            self._demands.frozen.append((atoms, reason))

    def tie_blocks(self, atoms: Labels, block: Labels) -> None:
        """Demand that equally many units stay in every block (grouped convolution)."""
        self._demands.blocks.append((atoms, block))

    def separate(self, atoms: Labels) -> None:
        """Put the units of these atoms and all others into different groups, so that both keep some."""
        self._demands.separated.append(atoms[atoms >= 0])

    def mark(self, atoms: Labels, kind: str) -> None:
        """Say what the units of these atoms are: a key of `arrays.units.KINDS`."""
        self._demands.marks.append((atoms[atoms >= 0], kind))

    def collapse(self, factor: Labels) -> Labels:
        """Return a factor with size 1 on every axis along which its units, as united so far, do not vary."""
        return collapsed(factor, self._store.classes)

    def holds(self, factor: Labels) -> NDArray[np.bool_]:
        """Tell of labels which of them are channels that may still go."""
        found: NDArray[np.bool_] = self._store.classes[factor] >= 0
        return found

    def free(self, factor: Labels) -> bool:
        """Tell of labels whether no tensor of the model holds any of their channels, as far as is known."""
        return not self._store.real[factor].any()

    def walk(self) -> None:
        """Begin a walk through the graph: forget what the last one said, but not what it united or made."""
        self._demands = Demands(made=self._demands.made)

    def walked(self) -> bool:
        """End a walk; tell whether it united anything that was apart before."""
        before = self._store.classes[: self._store.count].copy()
        component = self._components()
        smallest = np.full(self._store.count, self._store.count, np.int64)
        np.minimum.at(smallest, component, np.arange(self._store.count))
        classes = smallest[component]
        for atoms, _ in self._kept:
            classes[np.isin(component, component[atoms])] = -1
        self._store.classes[: self._store.count] = classes
        real = np.zeros(self._store.count, bool)
        real[component[self._store.real[: self._store.count]]] = True
        self._store.real[: self._store.count] = real[component]
        return not np.array_equal(before, classes)

    def force(self, factor: Labels, stays: NDArray[np.bool_], reason: str) -> None:
        """Let a factor vary along one axis less: along the one that leaves most units, atoms are united.

        Where a coordinate is fixed, all of its line stays for good.

        Args:
            factor: atoms that vary along several axes.
            stays: atoms that stay anyway, as `frozen` says it.
            reason: why those stay that stay for it.
        """
        fixed_here = stays[factor] | (self._store.classes[factor] < 0)
        classes = self._store.classes[factor]
        axis = max(varying(factor), key=lambda a: (units_left(classes, fixed_here, a), -factor.shape[a]))
        first = np.broadcast_to(factor.take([0], axis), factor.shape)
        lines = np.broadcast_to(fixed_here.any(axis, keepdims=True), factor.shape)
        both = (first >= 0) & (factor >= 0)
        self._edges.append((first[both], factor[both]))
        kept = factor[lines & (factor >= 0)]
        if kept.size:
            self._kept.append((kept, reason))

    def groups(self) -> Groups:
        """Gather units with the same slots into groups, and say for every frozen layer why."""
        self._demands.frozen.extend(self._kept)
        place = {layer: n for n, layer in enumerate(dict.fromkeys(a.layer for a in self._axes.values()))}
        axes = sorted(self._axes.values(), key=lambda axis: place[axis.layer])
        self._solution = solve(self._components(), axes, self._demands)
        return Groups(self._solution.groups, self._solution.frozen)

    def frozen(self) -> NDArray[np.bool_]:
        """Return for every atom whether this walk froze it; one entry more, for the label -1."""
        component = self._components()
        stays = np.zeros(self._store.count + 1, bool)
        for atoms, _ in self._demands.frozen:
            stays[component[atoms]] = True
        return np.append(stays[component], True)

    def staying(self, kept: Mapping[str, NDArray[np.int64]]) -> NDArray[np.bool_]:
        """Return for every atom whether it stays when groups keep only these units; needs `groups` first.

        The result has one entry more than there are atoms, True, so that label -1 indexes it rightly.
        """
        assert self._solution is not None, "groups() comes first"
        stays = np.ones(self._store.count + 1, bool)
        for number, group in enumerate(self._solution.groups):
            if group.name in kept:
                mine = np.flatnonzero(self._solution.group == number)
                stays[mine] = np.isin(self._solution.unit[mine], kept[group.name])
        return stays

    def _components(self) -> Labels:
        """Return the number of the connected component of every atom; edges are kept as one list."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        count = self._store.count
        if not count:
            return fixed(0)
        rows = np.concatenate([fixed(0), *(a for a, _ in self._edges)])
        columns = np.concatenate([fixed(0), *(b for _, b in self._edges)])
        graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
        found: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
        self._edges = _spanning(found)
        return found


def _spanning(component: Labels) -> list[tuple[Labels, Labels]]:
    """Return edges from every atom to the first one of its component."""
    _, first = np.unique(component, return_index=True)
    return [(np.arange(len(component), dtype=np.int64), first[component].astype(np.int64))]
