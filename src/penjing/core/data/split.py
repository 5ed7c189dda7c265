"""Splits of the data: arrays in memory, or training data that is read anew on every pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused

Arrays = tuple[NDArray[Any], ...]
Batch = tuple[Arrays, NDArray[Any]]
Walk = Callable[[int | None], Iterator[Batch]]
"""Makes one pass over the data: checked batches of any size; with a seed shuffled where that is possible."""


class Split:
    """One part of the data: batches of NumPy arrays that can be walked any number of times.

    `batches(size, seed)` yields `(inputs, targets)`; with a seed in shuffled order. `arrays()` returns
    everything at once. `len()` is the number of examples. `groups` holds for each example what it belongs to
    (a patient, a user, a document), or is None.
    """

    def __init__(
        self, inputs: Arrays, targets: NDArray[Any], name: str, groups: NDArray[Any] | None = None
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.name = name
        self.groups = groups

    def __len__(self) -> int:
        return len(self.targets)

    def arrays(self) -> Batch:
        """Return all inputs and all targets."""
        return self.inputs, self.targets

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `size` examples."""
        order = None if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(self), size):
            window = slice(start, start + size)
            index = window if order is None else order[window]
            yield tuple(x[index] for x in self.inputs), self.targets[index]

    def example(self) -> Arrays:
        """Return the first example as a batch of one."""
        return tuple(x[:1] for x in self.inputs)

    def take(self, index: NDArray[np.int64], name: str) -> Split:
        """Return a split of the examples at these places."""
        groups = None if self.groups is None else self.groups[index]
        return Split(tuple(x[index] for x in self.inputs), self.targets[index], name, groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return sum(x.nbytes for x in self.inputs)

    def fingerprint(self) -> str:
        """Return the SHA-256 of shapes, types and content, and of groups where there are any."""
        groups = () if self.groups is None else (np.unique(self.groups, return_inverse=True)[1],)
        return _digest((*self.inputs, self.targets, *groups))


class LiveSplit:
    """Training data that is read anew on every pass, so that the user's augmentation stays alive.

    The same interface as `Split`, but that `inputs` and `targets` are None and `batches` shuffles only data
    sets with an index; loaders and functions keep their own order.
    """

    inputs = None
    targets = None
    groups = None

    def __init__(self, walk: Walk, length: int, name: str) -> None:
        self._walk = walk
        self._length = length
        self._first: Batch | None = None
        self.name = name

    def __len__(self) -> int:
        return self._length

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of `size` examples, cut from what the source gives; the last may be smaller.

        Raises:
            Refused: the source gives nothing, an example cannot be read, or a batch differs from the first.
        """
        held: list[Batch] = []
        count, left = 0, len(self)
        for inputs, targets in self._walk(seed):
            targets = targets[:left]
            held.append((tuple(x[: len(targets)] for x in inputs), targets))
            count, left = count + len(targets), left - len(targets)
            while count >= size:
                ready, rest = _cut(held, size)
                held, count = [rest], count - size
                yield ready
            if left <= 0:
                break
        if left == len(self):
            raise self._used_up()
        if count:
            yield _cut(held, count)[0]

    def arrays(self) -> Batch:
        """Return the examples of one pass."""
        return next(self.batches(len(self)))

    def example(self) -> Arrays:
        """Return an example as a batch of one; the same at every call."""
        return tuple(x[:1] for x in self._first_batch()[0])

    def fingerprint(self) -> str:
        """Return a SHA-256 of the length, the shapes and, where two readings agree, the first batch."""
        inputs, targets = self._first_batch()
        again = self._read_first()
        first, second = (_digest((*x, y)) for x, y in ((inputs, targets), again))
        shapes = "|".join(f"{x.dtype}{x.shape[1:]}" for x in inputs)
        content = first if first == second else ""
        return hashlib.sha256(f"{len(self)}|{shapes}|{content}".encode()).hexdigest()

    def _first_batch(self) -> Batch:
        if self._first is None:
            self._first = self._read_first()
        return self._first

    def _read_first(self) -> Batch:
        for batch in self._walk(None):
            return batch
        raise self._used_up()

    def _used_up(self) -> Refused:
        return Refused(
            "the data must give its examples on every pass",
            value="0 examples",
            place=f"task.{self.name}",
            fix="pass a function that makes a new iterator each time",
        )


def divide_groups(
    groups: NDArray[Any], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw whole groups until they make up a share of the examples; return the rest and the drawn, sorted.

    Args:
        groups: `[n]`, equal for examples that stay together.
        share: of the examples to draw, between 0 and 1.
        seed: of the draw.

    >>> rest, drawn = divide_groups(np.array([0, 0, 1, 1]), 0.5, seed=0)
    >>> sorted([rest.tolist(), drawn.tolist()])
    [[0, 1], [2, 3]]
    """
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    chosen = np.zeros(len(sizes), bool)
    chosen[order[ends - sizes[order] / 2 <= share * len(groups)]] = True
    drawn = chosen[number]
    return np.flatnonzero(~drawn), np.flatnonzero(drawn)


def divide(targets: NDArray[Any], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw a share of the examples, the same of every class, and return the rest and the drawn, sorted.

    Args:
        targets: `[n]` class indices; for anything else the draw is plain.
        share: of the examples to draw, between 0 and 1.
        seed: of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(targets))
    if targets.ndim == 1 and targets.dtype.kind in "iu":
        order = order[np.argsort(targets[order], kind="stable")]
    steps = np.floor(np.arange(len(order) + 1) * share + 0.5)
    drawn = np.diff(steps) > 0
    return np.sort(order[~drawn]), np.sort(order[drawn])


def _cut(held: list[Batch], size: int) -> tuple[Batch, Batch]:
    inputs = tuple(np.concatenate(parts) for parts in zip(*(x for x, _ in held), strict=True))
    targets = np.concatenate([y for _, y in held])
    return (tuple(x[:size] for x in inputs), targets[:size]), (
        tuple(x[size:] for x in inputs),
        targets[size:],
    )


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
