"""What a teacher said of every example, remembered where examples do not change."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.cache import keep_array, recall_array
from penjing.core.task import Split
from penjing.train.objective import Tensors, tensors_of

if TYPE_CHECKING:
    from penjing.train.teacher import Teacher

Recall = Callable[[Tensors, Any], tuple[Any, Any]]
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


def recalling(split: Split, teach: Teacher, table: NDArray[np.float32] | None) -> tuple[Split, Recall]:
    """Return a split and a function of its batches that gives the labels and the teacher's outputs.

    Examples that come from arrays never change: the targets of the split returned are then row numbers,
    and the teacher sees every example once. Live data may be augmented: the teacher sees every batch.

    Args:
        split: to train on.
        teach: runs the teacher.
        table: its outputs for every example, where they are known.
    """
    if not fixed(split):
        return asking(split, teach)
    return Split(split.inputs, np.arange(len(split)), split.name), _Memory(split, teach, table)


def asking(split: Split, teach: Teacher) -> tuple[Split, Recall]:
    """Return the split and a function that asks the teacher for every batch, as the student sees it."""
    return split, lambda inputs, targets: (targets, teach(inputs))


def fixed(split: Split) -> bool:
    """Tell whether the examples of a split are arrays, which never change."""
    return getattr(split, "inputs", None) is not None


def known_outputs(
    split: Split, teach: Teacher, key: str, notes: MutableMapping[str, Any]
) -> NDArray[np.float32] | None:
    """Return the teacher's outputs of every example `[n, teachers, ...]`, from the disk or kept there.

    None where the table would be larger than `DISK_BYTES`. What is read is checked against the outputs of a
    few examples; what is damaged or differs is computed again. Seconds and events go to `notes`.

    Args:
        split: of arrays.
        teach: runs the teacher.
        key: of teacher, data and precision, in hexadecimal.
        notes: of the context.
    """
    start = time.perf_counter()
    found = recall_array("teachers", key)
    events = [found.note] if found.note else []
    table = found.array
    if table is not None and not _agrees(table, split, teach):
        events.append("the cached outputs of the teacher are not what it gives now: they are computed again")
        table = None
    if table is None:
        table = _computed(split, teach)
        said = "" if table is None else keep_array("teachers", key, table)
        events += [said] if said else []
    else:
        events.append(f"the teacher's outputs of {len(split)} examples were read from the cache")
    seconds = time.perf_counter() - start
    for name in ("teacher_s", "training_s"):
        notes[name] = notes.get(name, 0.0) + seconds
    notes.setdefault("events", []).extend(f"teacher: {event}" for event in events)
    return table


def _agrees(table: NDArray[Any], split: Split, teach: Teacher) -> bool:
    wanted = _outputs(split, teach, 0, min(CHECKED, len(split)))
    if table.shape != (len(split), *wanted.shape[1:]) or table.dtype != wanted.dtype:
        return False
    a, b = (np.nan_to_num(x, posinf=0.0, neginf=0.0).ravel() for x in (table[: len(wanted)], wanted))
    return bool(np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b))


def _computed(split: Split, teach: Teacher) -> NDArray[np.float32] | None:
    first = _outputs(split, teach, 0, min(BATCH, len(split)))
    if first[0].nbytes * len(split) > DISK_BYTES:
        return None
    rest = [_outputs(split, teach, at, at + BATCH) for at in range(BATCH, len(split), BATCH)]
    return np.concatenate([first, *rest])


def _outputs(split: Split, teach: Teacher, start: int, end: int) -> NDArray[np.float32]:
    like = next(iter(teach.module.parameters()), None)
    outputs = teach(tensors_of(tuple(x[start:end] for x in split.inputs), like))
    found: NDArray[np.float32] = outputs.cpu().numpy()
    return found


class _Memory:
    """The teacher's outputs of every row, each computed when it is first asked for."""

    def __init__(self, split: Split, teach: Teacher, table: NDArray[np.float32] | None) -> None:
        self._targets, self._teach = split.targets, teach
        self._labels: Any = None
        self._table: Any = None if table is None else tensors_of((table,))[0]
        self._known: Any = None

    def __call__(self, inputs: Tensors, rows: Any) -> tuple[Any, Any]:
        if self._labels is None:
            self._labels = tensors_of((self._targets,))[0].to(inputs[0].device)
        if self._table is None:
            told = self._teach(inputs)
            if told[0].nbytes * len(self._labels) > CACHE_BYTES:
                return self._labels[rows], told
            self._table = told.new_zeros((len(self._labels), *told.shape[1:]))
            self._known = rows.new_zeros(len(self._labels)).bool()
            self._note(rows, told)
        if self._known is None:
            return self._labels[rows], self._table[rows.cpu()].to(inputs[0].device)
        new = ~self._known[rows]
        if bool(new.any()):
            self._note(rows[new], self._teach(tuple(x[new] for x in inputs)))
        return self._labels[rows], self._table[rows]

    def _note(self, rows: Any, told: Any) -> None:
        self._table[rows] = told
        self._known[rows] = True
