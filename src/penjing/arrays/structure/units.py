"""From united atoms to groups: which units can go, and which of them are alike.

A unit is a class of united atoms. It can go if a layer makes it, something uses it up and nothing freezes it.
Units that appear in the same axes of the same tensors form a group; units that share a tie of blocks (grouped
convolution) come into one group with the finest fair partition.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.structure.labels import Labels, fixed
from penjing.core.backend import Group, Slot

KINDS = ("channel", "hidden", "head width", "head")
"""What a unit can be, the stronger word later; see `core.backend.Group.kind`."""


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor with its atoms; `maker` where it is the output of a layer."""

    layer: str
    tensor: str
    axis: int
    atoms: Labels
    maker: bool


@dataclass
class Demands:
    """What a walk through the graph asks of atoms; see the methods of `Coupling`."""

    made: list[Labels] = field(default_factory=list)
    consumed: list[Labels] = field(default_factory=list)
    eaten: list[Labels] = field(default_factory=list)
    separated: list[Labels] = field(default_factory=list)
    frozen: list[tuple[Labels, str]] = field(default_factory=list)
    blocks: list[tuple[Labels, Labels]] = field(default_factory=list)
    marks: list[tuple[Labels, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Solution:
    """Groups, reasons of frozen layers, and of every atom its group and its unit there (-1: none)."""

    groups: tuple[Group, ...]
    frozen: dict[str, str]
    group: Labels
    unit: Labels


def solve(component: Labels, axes: list[Axis], demands: Demands) -> Solution:
    """Gather units into groups.

    Args:
        component: the number of every atom's class.
        axes: axes of tensors in the order of the graph, which orders and names the groups.
        demands: what is asked of the atoms.
    """
    return _Solver(component, axes, demands).solution()


class _Solver:
    def __init__(self, component: Labels, axes: list[Axis], demands: Demands) -> None:
        self._component, self._axes, self._demands = component, axes, demands
        self._count = int(component.max(initial=-1)) + 1
        made = self._atoms([*demands.made, *(axis.atoms for axis in axes if axis.maker)])
        self._consumed = self._atoms(demands.consumed)
        self._makers = [axis.maker or bool(made[axis.atoms].any()) for axis in axes]
        self._words = [why for _, why in demands.frozen]
        self._why = fixed(self._count)
        for number, (atoms, _) in enumerate(demands.frozen):
            units = component[atoms]
            self._why[units[self._why[units] < 0]] = number
        eaten = self._consumed | self._atoms(demands.eaten)
        self._usable = self._units(made) & self._units(eaten) & (self._why < 0)
        self._ties = [tie for tie in demands.blocks if not _harmless(component, *tie)]

    def solution(self) -> Solution:
        self._freeze_untidy_blocks()
        group_of, unit_of = fixed(self._count), fixed(self._count)
        cells: list[Labels] = []
        for members in self._classes():
            found = self._cells(members)
            if found is None:
                self._give_up(members, "its ties of blocks contradict each other")
                continue
            group_of[members], unit_of[members] = len(cells), np.arange(len(members))
            cells.append(found)
        groups = self._groups(group_of, unit_of, cells)
        named = {layer for group in groups for layer in group.layers}
        frozen = {layer: why for layer, why in self._frozen_layers().items() if layer not in named}
        return Solution(groups, frozen, group_of[self._component], unit_of[self._component])

    def _atoms(self, lists: list[Labels]) -> NDArray[np.bool_]:
        marked = np.zeros(len(self._component), bool)
        for atoms in lists:
            marked[atoms] = True
        return marked

    def _units(self, atoms: NDArray[np.bool_]) -> NDArray[np.bool_]:
        marked = np.zeros(self._count, bool)
        marked[self._component[atoms]] = True
        return marked

    def _give_up(self, units: Labels, why: str) -> None:
        self._usable[units] = False
        fresh = units[self._why[units] < 0]
        self._why[fresh] = len(self._words)
        self._words.append(why)

    def _freeze_untidy_blocks(self) -> None:
        """Freeze whole ties of which a unit is frozen already, sits in two blocks or counts unequally."""
        changed = True
        while changed:
            changed = False
            for atoms, block in self._ties:
                units = self._component[atoms[atoms >= 0]]
                usable = self._usable[units]
                if not usable.any() or (usable.all() and (atoms >= 0).all() and _tidy(units, block)):
                    continue
                reasons = self._why[units][self._why[units] >= 0]
                why = self._words[reasons[0]] if len(reasons) else "its blocks cannot shrink equally"
                self._give_up(np.unique(units), why)
                changed = True

    def _classes(self) -> list[Labels]:
        """Gather units by the axes they appear in; units that share a tie of blocks come together."""
        kind = np.where(self._usable, 0, -1).astype(np.int64)
        first = np.full(self._count, len(self._axes), np.int64)
        count = 1
        axes = [self._component[axis.atoms] for axis in self._axes]
        for number, units in enumerate([*axes, *(self._component[a] for a in self._demands.separated)]):
            units = np.unique(units[self._usable[units]])
            if not len(units):
                continue
            old, new = np.unique(kind[units], return_inverse=True)
            kind[units] = count + new.reshape(-1)
            count += len(old)
            if number < len(axes):
                first[units] = np.minimum(first[units], number)
        kind = self._merged(kind, count)
        order = np.argsort(kind, kind="stable")
        order = order[kind[order] >= 0]
        splits = np.flatnonzero(np.diff(kind[order])) + 1
        found = [part for part in np.split(order, splits) if len(part)]
        return sorted(found, key=lambda members: (int(first[members].min()), int(members[0])))

    def _merged(self, kind: Labels, count: int) -> Labels:
        """Give one number to the kinds of units that share a tie of blocks."""
        parent = np.arange(count + 1)
        for atoms, _ in self._ties:
            kinds = kind[self._component[atoms[atoms >= 0]]]
            kinds = np.unique(parent[kinds[kinds >= 0]])
            if len(kinds) > 1:
                parent[np.isin(parent, kinds)] = kinds[0]
        parent[-1] = -1
        merged: Labels = parent[kind].astype(np.int64)
        return merged

    def _cells(self, members: Labels) -> Labels | None:
        """Return the finest partition of the units that every tie asks for; None if there is no fair one."""
        position = fixed(self._count)
        position[members] = np.arange(len(members))
        columns = [np.zeros(len(members), np.int64)]
        for atoms, block in self._ties:
            places = position[self._component[atoms[atoms >= 0]]]
            if (places >= 0).any():
                column = fixed(len(members))
                column[places[places >= 0]] = block[atoms >= 0][places >= 0]
                columns.append(column)
        _, cells = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
        cells = cells.reshape(-1).astype(np.int64)
        fair = _even(np.bincount(cells)) and all(
            _even(np.unique(c[np.unique(cells, return_index=True)[1]], return_counts=True)[1])
            for c in columns
        )
        return cells if fair else None

    def _groups(self, group_of: Labels, unit_of: Labels, cells: list[Labels]) -> tuple[Group, ...]:
        slots: list[list[Slot]] = [[] for _ in cells]
        layers: list[list[str]] = [[] for _ in cells]
        for axis, maker in zip(self._axes, self._makers, strict=True):
            units = self._component[axis.atoms]
            for number in np.unique(group_of[units]):
                if number < 0:
                    continue
                mine = group_of[units] == number
                role = "in" if self._consumed[axis.atoms[mine]].any() else "out"
                slot = Slot(axis.layer, axis.tensor, axis.axis, np.where(mine, unit_of[units], -1), role)
                slots[number].append(slot)
                if maker and axis.layer not in layers[number]:
                    layers[number].append(axis.layer)
        kinds = self._kinds(group_of, len(cells))
        found: list[Group] = []
        taken: set[str] = set()
        for number, cell in enumerate(cells):
            mine, makers = tuple(slots[number]), tuple(layers[number])
            name = _new_name(makers[0] if makers else mine[0].layer, taken)
            taken.add(name)
            found.append(Group(name, len(cell), mine, makers, cell, kinds[number]))
        return tuple(found)

    def _kinds(self, group_of: Labels, count: int) -> list[str]:
        strongest = np.zeros(count + 1, np.int64)
        for atoms, kind in self._demands.marks:
            np.maximum.at(strongest, group_of[self._component[atoms]], KINDS.index(kind))
        return [KINDS[number] for number in strongest[:count]]

    def _frozen_layers(self) -> dict[str, str]:
        frozen: dict[str, str] = {}
        for axis, maker in zip(self._axes, self._makers, strict=True):
            units = self._component[axis.atoms]
            if maker and not self._usable[units].any():
                reasons = self._why[units][self._why[units] >= 0]
                why = self._words[reasons[0]] if len(reasons) else "no layer consumes its channels"
                frozen.setdefault(axis.layer, why)
        return frozen


def _harmless(component: Labels, atoms: Labels, block: Labels) -> bool:
    """Whether every unit counts equally often in all blocks, so that it goes from all of them at once."""
    if (atoms < 0).any():
        return False
    pairs, counts = np.unique(np.stack([component[atoms], block], 1), axis=0, return_counts=True)
    units, first, blocks = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    same = np.repeat(counts[first], blocks)
    return bool((blocks == len(np.unique(block))).all() and (counts == same).all() and len(units) > 0)


def _tidy(units: Labels, block: Labels) -> bool:
    """Whether every unit sits in one block, and units fill every block in the same way."""
    pairs = np.unique(np.stack([units, block], 1), axis=0)
    return (
        len(np.unique(pairs[:, 0])) == len(pairs)
        and _even(np.unique(units, return_counts=True)[1])
        and _even(np.unique(pairs[:, 1], return_counts=True)[1])
    )


def _even(counts: Iterable[int]) -> bool:
    return len({int(c) for c in counts}) <= 1


def _new_name(name: str, taken: set[str]) -> str:
    suffixes = (f"#{number}" for number in range(2, len(taken) + 3))
    return next(n for n in (name, *(name + s for s in suffixes)) if n not in taken)
