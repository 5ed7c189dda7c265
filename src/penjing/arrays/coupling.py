"""Which channels can only go together: labels carried through a graph, united where they meet.

Every index along an axis of a tensor that holds channels is an *atom*. Each axis of a value that flows
through the graph carries an array of atoms (-1: a coordinate that is no channel), so that concatenation,
flattening, slicing and padding are plain NumPy indexing on those arrays. Where two axes meet, their atoms
are united; the classes of atoms are the units that go or stay as one. Knows no framework.
(The dependency graph of Fang et al. 2023, "DepGraph", on single channels instead of whole layers.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import Group, Groups, Slot

Labels = NDArray[np.int64]
"""Atoms along one axis; -1 where a coordinate is no channel."""


def fixed(length: int) -> Labels:
    """Return labels of an axis that holds no channels."""
    return np.full(length, -1, np.int64)


@dataclass(frozen=True)
class _Axis:
    layer: str
    tensor: str
    axis: int
    atoms: Labels
    maker: bool


@dataclass
class _Units:
    """The solved classes: `group[a]` and `unit[a]` of every atom, -1 where it belongs to none."""

    group: Labels
    unit: Labels
    names: list[str] = field(default_factory=list)


class Coupling:
    """Collects atoms, unions, consumptions and freezes; `groups` solves them once at the end."""

    def __init__(self) -> None:
        self._count = 0
        self._axes: dict[tuple[str, str, int, int], _Axis] = {}
        self._edges: list[tuple[Labels, Labels]] = []
        self._consumed: list[Labels] = []
        self._frozen: list[tuple[Labels, str]] = []
        self._blocks: list[tuple[Labels, Labels]] = []
        self._solved: _Units | None = None

    def fresh(self, length: int) -> Labels:
        """Return new atoms that no tensor makes, for example channels of zeros from padding."""
        self._count += length
        return np.arange(self._count - length, self._count, dtype=np.int64)

    def axis(self, layer: str, tensor: str, axis: int, length: int, *, maker: bool = False) -> Labels:
        """Return the atoms of one axis of one tensor, the same ones whenever it is asked for again.

        `length` differs from the tensor's own where the axis counts something else: the input axis of a
        grouped convolution counts the channels of all blocks. `maker` says that the axis is the output of
        a layer (weight rows of a convolution), which names groups and reports.
        """
        key = (layer, tensor, axis, length)
        if key not in self._axes:
            self._axes[key] = _Axis(layer, tensor, axis, self.fresh(length), maker)
        return self._axes[key].atoms

    def unite(self, first: Labels, second: Labels, reason: str) -> None:
        """Make the atoms at equal positions one; an atom that meets -1 is frozen for the reason."""
        assert first.shape == second.shape, (first.shape, second.shape)
        both = (first >= 0) & (second >= 0)
        self._edges.append((first[both], second[both]))
        self.freeze(np.where(both, -1, np.maximum(first, second)), reason)

    def consume(self, atoms: Labels) -> None:
        """Mark atoms of a weight's axis as inputs: without the unit, these columns go."""
        self._consumed.append(atoms[atoms >= 0])

    def freeze(self, atoms: Labels, reason: str) -> None:
        """Keep the units of these atoms forever; the first reason given for a unit counts."""
        atoms = atoms[atoms >= 0]
        if atoms.size:
            self._frozen.append((atoms, reason))

    def tie_blocks(self, atoms: Labels, block: Labels) -> None:
        """Demand that equally many units stay in every block (grouped convolution)."""
        self._blocks.append((atoms, block))

    def groups(self) -> Groups:
        """Gather units with the same slots into groups, and say for every frozen layer why."""
        component = self._components()
        reason = self._reasons(component)
        usable = self._usable(component, reason)
        self._freeze_untidy_blocks(component, usable, reason)
        classes = self._classes(component, usable, reason)
        solved = _Units(fixed(self._count), fixed(self._count))
        groups = []
        for members in classes:
            group = self._group(members, component, solved, taken=solved.names)
            groups.append(group)
        self._solved = solved
        return Groups(tuple(groups), self._frozen_layers(component, usable, reason))

    def staying(self, kept: Mapping[str, NDArray[np.int64]]) -> NDArray[np.bool_]:
        """Return for every atom whether it stays when groups keep only these units; needs `groups` first.

        The result has one entry more than there are atoms, True, so that label -1 indexes it rightly.
        """
        assert self._solved is not None, "groups() comes first"
        stays = np.ones(self._count + 1, bool)
        for number, name in enumerate(self._solved.names):
            if name in kept:
                mine = np.flatnonzero(self._solved.group == number)
                stays[mine] = np.isin(self._solved.unit[mine], kept[name])
        return stays

    def _components(self) -> Labels:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        if not self._count:
            return fixed(0)
        rows = np.concatenate([fixed(0), *(a for a, _ in self._edges)])
        columns = np.concatenate([fixed(0), *(b for _, b in self._edges)])
        shape = (self._count, self._count)
        graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=shape)
        found: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
        return found

    def _reasons(self, component: Labels) -> dict[int, str]:
        reason: dict[int, str] = {}
        for atoms, why in self._frozen:
            for number in np.unique(component[atoms]):
                reason.setdefault(int(number), why)
        return reason

    def _usable(self, component: Labels, reason: Mapping[int, str]) -> set[int]:
        """Units that some layer makes, some layer consumes and nothing freezes."""
        consumed = self._all_consumed()
        made = {int(c) for axis in self._axes.values() if axis.maker for c in component[axis.atoms]}
        eaten = {int(c) for c in component[consumed]}
        return (made & eaten) - set(reason)

    def _all_consumed(self) -> Labels:
        return np.concatenate([fixed(0), *self._consumed])

    def _freeze_untidy_blocks(self, component: Labels, usable: set[int], reason: dict[int, str]) -> None:
        """Freeze whole ties of which a unit is frozen already, sits in two blocks or counts unequally."""
        changed = True
        while changed:
            changed = False
            for atoms, block in self._blocks:
                units = component[np.maximum(atoms, 0)]
                members = {int(u) for u, a in zip(units, atoms, strict=True) if a >= 0}
                if not members & usable or (members <= usable and _tidy(units, block)):
                    continue
                why = next((reason[u] for u in members if u in reason), "its blocks cannot shrink equally")
                reason.update(dict.fromkeys(members - set(reason), why))
                usable -= members
                changed = True

    def _classes(self, component: Labels, usable: set[int], reason: dict[int, str]) -> list[list[int]]:
        """Gather units by the axes they appear in; units that share a tie of blocks come together."""
        seen: dict[int, list[int]] = defaultdict(list)
        for number, axis in enumerate(self._axes.values()):
            for unit in np.unique(component[axis.atoms]):
                if int(unit) in usable:
                    seen[int(unit)].append(number)
        signature = {unit: tuple(axes) for unit, axes in seen.items()}
        parent = {s: s for s in signature.values()}

        def root(s: tuple[int, ...]) -> tuple[int, ...]:
            while parent[s] != s:
                s = parent[s]
            return s

        for atoms, _ in self._blocks:
            roots = [root(signature[int(u)]) for u in np.unique(component[atoms]) if int(u) in usable]
            for other in roots[1:]:
                parent[root(other)] = root(roots[0])
        classes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for unit in sorted(signature):
            classes[root(signature[unit])].append(unit)
        found = []
        for members in classes.values():
            if self._cells(members, component) is None:
                reason.update(dict.fromkeys(members, "its ties of blocks contradict each other"))
                usable -= set(members)
            else:
                found.append(members)
        return sorted(found, key=lambda members: min(signature[u] for u in members))

    def _cells(self, members: list[int], component: Labels) -> Labels | None:
        """Return the finest partition of the units that every tie asks for; None if there is no fair one."""
        position = {unit: i for i, unit in enumerate(members)}
        columns = [np.zeros(len(members), np.int64)]
        for atoms, block in self._blocks:
            column = fixed(len(members))
            for atom, value in zip(component[atoms], block, strict=True):
                if int(atom) in position:
                    column[position[int(atom)]] = value
            if (column >= 0).any():
                columns.append(column)
        _, cells = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
        cells = cells.reshape(-1).astype(np.int64)
        fair = _even(np.bincount(cells)) and all(
            _even(np.unique(c[np.unique(cells, return_index=True)[1]], return_counts=True)[1])
            for c in columns
        )
        return cells if fair else None

    def _group(self, members: list[int], component: Labels, solved: _Units, taken: list[str]) -> Group:
        number_of = fixed(len(component))
        number_of[members] = np.arange(len(members))
        consumed = np.zeros(self._count, bool)
        consumed[self._all_consumed()] = True
        slots, layers = [], []
        for axis in self._axes.values():
            units = number_of[component[axis.atoms]]
            if (units < 0).all():
                continue
            role = "in" if consumed[axis.atoms[units >= 0]].any() else "out"
            slots.append(Slot(axis.layer, axis.tensor, axis.axis, units, role))
            if axis.maker and axis.layer not in layers:
                layers.append(axis.layer)
        mine = number_of[component] >= 0
        solved.group[mine] = len(taken)
        solved.unit[mine] = number_of[component][mine]
        taken.append(_new_name(layers[0] if layers else slots[0].layer, taken))
        cells = self._cells(members, component)
        assert cells is not None
        return Group(taken[-1], len(members), tuple(slots), tuple(layers), cells)

    def _frozen_layers(
        self, component: Labels, usable: set[int], reason: Mapping[int, str]
    ) -> dict[str, str]:
        frozen: dict[str, str] = {}
        for axis in self._axes.values():
            units = [int(u) for u in np.unique(component[axis.atoms])]
            if axis.maker and not usable.intersection(units):
                why = next((reason[u] for u in units if u in reason), "no layer consumes its channels")
                frozen.setdefault(axis.layer, why)
        return frozen


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


def _new_name(name: str, taken: list[str]) -> str:
    suffixes = (f"#{number}" for number in range(2, len(taken) + 3))
    return next(n for n in (name, *(name + s for s in suffixes)) if n not in taken)
