"""A teacher's outputs of every example, computed once where examples do not change."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penjing.core.cache import keep_array, recall_array
from penjing.core.task import Split
from penjing.train.objective import Tensors, to_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn


class RunsTeacher(Protocol):
    """What gives a teacher's outputs in float32, `[n, teachers, ...]`."""

    module: nn.Module

    def __call__(self, inputs: Tensors) -> Tensor:
        """Return the outputs for a batch of inputs."""


Lookup = Callable[[Tensors, "Tensor"], tuple["Tensor", "Tensor"]]
"""From the inputs and targets of a batch to its labels and the teacher's outputs."""

CACHE_BYTES = 1 << 30
"""Largest table of a teacher's outputs to keep in memory."""

DISK_BYTES = 1 << 28
"""Largest table to keep on disk."""

BATCH = 256
"""Examples that a teacher sees at once when it fills a table; fixed, so that the last bits are too."""

CHECKED = 32
"""Examples whose outputs are computed anew to check a table from the disk."""

TOLERANCE = 0.01
"""Largest relative difference of those outputs; bfloat16 on another machine stays below it."""


def remember_outputs(
    split: Split, teacher: RunsTeacher, table: NDArray[np.float32] | None
) -> tuple[Split, Lookup]:
    """Return a split and a function of its batches that gives the labels and the teacher's outputs.

    Examples that come from arrays never change: the targets of the split returned are then row numbers,
    and the teacher sees every example once. Live data may be augmented: the teacher sees every batch.

    Args:
        split: to train on.
        teacher: gives the outputs.
        table: its outputs for every example, where they are known.
    """
    if not is_fixed(split):
        return query_outputs(split, teacher)
    return Split(split.inputs, np.arange(len(split)), split.name), _OutputTable(split, teacher, table)


def query_outputs(split: Split, teacher: RunsTeacher) -> tuple[Split, Lookup]:
    """Return the split and a function that runs the teacher on every batch, as the student sees it."""
    return split, lambda inputs, targets: (targets, teacher(inputs))


def is_fixed(split: Split) -> bool:
    """Tell whether the examples of a split are arrays, which never change.

    >>> is_fixed(Split((np.zeros((2, 3)),), np.zeros(2), "train"))
    True
    """
    return getattr(split, "inputs", None) is not None


def load_outputs(
    split: Split, teacher: RunsTeacher, key: str, notes: MutableMapping[str, Any]
) -> NDArray[np.float32] | None:
    """Return the teacher's outputs of every example `[n, teachers, ...]`, from the disk or kept there.

    None where the table would be larger than `DISK_BYTES`. What is read is checked against the outputs of a
    few examples; what is damaged or differs is computed again. Seconds and events go to `notes`.

    Args:
        split: of arrays.
        teacher: gives the outputs.
        key: of teacher, data and precision, in hexadecimal.
        notes: of the context.
    """
    start = time.perf_counter()
    found = recall_array("teachers", key)
    events = [found.note] if found.note else []
    table = found.array
    if table is not None and not _agrees(table, split, teacher):
        events.append("the cached outputs of the teacher are not what it gives now: they are computed again")
        table = None
    if table is None:
        table = _computed(split, teacher)
        said = "" if table is None else keep_array("teachers", key, table)
        events += [said] if said else []
    else:
        events.append(f"the teacher's outputs of {len(split)} examples were read from the cache")
    seconds = time.perf_counter() - start
    for name in ("teacher_s", "training_s"):
        notes[name] = notes.get(name, 0.0) + seconds
    notes.setdefault("events", []).extend(f"teacher: {event}" for event in events)
    return table


def _agrees(table: NDArray[Any], split: Split, teacher: RunsTeacher) -> bool:
    wanted = _outputs(split, teacher, 0, min(CHECKED, len(split)))
    if table.shape != (len(split), *wanted.shape[1:]) or table.dtype != wanted.dtype:
        return False
    a, b = (np.nan_to_num(x, posinf=0.0, neginf=0.0).ravel() for x in (table[: len(wanted)], wanted))
    return bool(np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b))


def _computed(split: Split, teacher: RunsTeacher) -> NDArray[np.float32] | None:
    first = _outputs(split, teacher, 0, min(BATCH, len(split)))
    if first[0].nbytes * len(split) > DISK_BYTES:
        return None
    rest = [_outputs(split, teacher, at, at + BATCH) for at in range(BATCH, len(split), BATCH)]
    return np.concatenate([first, *rest])


def _outputs(split: Split, teacher: RunsTeacher, start: int, end: int) -> NDArray[np.float32]:
    like = next(iter(teacher.module.parameters()), None)
    outputs = teacher(to_tensors(tuple(x[start:end] for x in split.inputs), like))
    found: NDArray[np.float32] = outputs.cpu().numpy()
    return found


class _OutputTable:
    """The teacher's outputs of every row, each computed when it is first asked for."""

    def __init__(self, split: Split, teacher: RunsTeacher, table: NDArray[np.float32] | None) -> None:
        self._targets, self._teacher = split.targets, teacher
        self._labels: Tensor | None = None
        self._table: Tensor | None = None if table is None else to_tensors((table,))[0]
        self._known: Tensor | None = None

    def __call__(self, inputs: Tensors, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self._labels is None:
            self._labels = to_tensors((self._targets,))[0].to(inputs[0].device)
        if self._table is not None and self._known is None:
            return self._labels[rows], self._table[rows.cpu()].to(inputs[0].device)
        if self._table is None or self._known is None:
            outputs = self._teacher(inputs)
            if outputs[0].nbytes * len(self._labels) > CACHE_BYTES:
                return self._labels[rows], outputs
            self._table = outputs.new_zeros((len(self._labels), *outputs.shape[1:]))
            self._known = rows.new_zeros(len(self._labels)).bool()
            self._table[rows], self._known[rows] = outputs, True
            return self._labels[rows], self._table[rows]
        new = ~self._known[rows]
        if bool(new.any()):
            self._table[rows[new]] = self._teacher(tuple(x[new] for x in inputs))
            self._known[rows[new]] = True
        return self._labels[rows], self._table[rows]
