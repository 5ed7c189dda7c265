"""Read the user's data, whatever form it comes in, and refuse what could not be trained or judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.data.checks import as_array, as_input, as_target, attempt, refuse_not_finite
from penjing.core.data.copies import row_hashes
from penjing.core.data.split import Arrays, Batch, LiveSplit, Split
from penjing.core.errors import Refused

CHUNK = 64
WITHOUT_LENGTH = 200_000
"""Examples read from data without a length before it is taken to be endless."""


@dataclass(frozen=True)
class Reader:
    """How one split is read.

    Attributes:
        name: of the split, for messages.
        labels: whether targets must be class indices.
        limit: largest number of examples.
        seed: of the choice where the limit leaves some out.
    """

    name: str
    labels: bool
    limit: int | None
    seed: int

    @property
    def place(self) -> str:
        """Where the data was given."""
        return f"task.{self.name}"

    def read(
        self, data: Any, live: bool, groups: NDArray[Any] | None = None
    ) -> tuple[Split | LiveSplit, tuple[str, ...]]:
        """Return the split and notes on what was done to the data; `live` leaves loaders unread.

        Args:
            data: as the user gives it.
            live: whether data other than arrays stay what they are, to be read anew on every pass.
            groups: `[n]`, what each example belongs to.

        Raises:
            Refused: no data, data of another form, an example, input or label that cannot be used, other
                examples on every pass, or another number of groups than of examples.
        """
        if data is None:
            raise Refused(
                "the split must be given", place=self.place, fix="pass (inputs, targets) or a loader"
            )
        if isinstance(data, LiveSplit):
            return (data, ()) if live else (self._together([data.arrays()]), ())
        if isinstance(data, Split):
            groups = data.groups if groups is None else groups
            data = data.arrays()
        pair = _pair(data, self.place) if _is_pair_of_arrays(data) else None
        if pair is not None:
            split = self._together([self._arrays(pair, self.place)])
            return self._limited(self._grouped(split, groups)), _cast(pair[0], split.inputs)
        if live:
            return self._live(data), self._dropped(data, None)
        split = self._once(data)
        if _is_indexed(data, self.place):
            order = self._order(len(data))
            groups = groups if order is None or groups is None else np.asarray(groups)[order][: len(split)]
            return self._limited(self._grouped(split, groups)), ()
        notes = self._dropped(data, len(split))
        split, said = self._in_order(data, split, groups is not None)
        return self._limited(self._grouped(split, groups)), (*notes, *said)

    def _order(self, length: int) -> NDArray[np.int64] | None:
        """Return the order in which a limited part of an indexed data set is read, None for its own."""
        return None if self.limit is None else np.random.default_rng(self.seed).permutation(length)

    def _once(self, data: Any) -> Split:
        """Return the examples of one pass."""
        walk = self._walk(data, None if self.limit is None else self.seed, check=False)
        batches = self._bounded(walk) if _length(data, self.place) is None or self.limit is not None else walk
        return self._together(list(batches))

    def _grouped(self, split: Split, groups: NDArray[Any] | None) -> Split:
        if groups is None:
            return split
        names = np.asarray(groups)
        if names.shape != (len(split),):
            raise Refused(
                "the groups must be one for each example",
                value=f"shape {names.shape} for {len(split)} examples",
                place=f"task.groups, {self.name}",
                fix="give one name or number for each example, in the order of the data",
            )
        return Split(split.inputs, split.targets, split.name, names)

    def _dropped(self, data: Any, read: int | None) -> tuple[str, ...]:
        """Return a note on the examples that a loader leaves out at its end; `read` is None before a pass."""
        total, size = _length(data, self.place), _batch_size(data)
        if total is None or self.limit is not None:
            return ()
        if read is None:
            read = total // size * size if getattr(data, "drop_last", False) and size else total
        if read >= total:
            return ()
        return (f"the loader of {self.name} leaves out {total - read} of {total} examples (drop_last)",)

    def _in_order(self, data: Any, split: Split, grouped: bool) -> tuple[Split, tuple[str, ...]]:
        """Return examples in an order that the next start finds again, and a note if the source has none."""
        first = next(self._walk(data), None)
        if first is not None and all(
            np.array_equal(a, b[: len(a)])
            for a, b in zip((*first[0], first[1]), (*split.inputs, split.targets), strict=True)
        ):
            return split, ()
        if grouped or self.limit is not None:
            what = "groups" if grouped else "max_examples"
            raise Refused(
                f"the data must come in a fixed order where there is {what}",
                value="a loader that shuffles",
                place=self.place,
                fix=f"turn shuffling off for {self.name}",
            )
        rows = row_hashes((*split.inputs, split.targets))
        again = self._once(data)
        if sorted(rows) == sorted(row_hashes((*again.inputs, again.targets))):
            order = np.array(sorted(range(len(rows)), key=rows.__getitem__))
            return split.take(order, self.name), (
                f"the loader of {self.name} shuffles: its examples were put in the order of their content",
            )
        if self.name != "train":
            raise Refused(
                "the examples must be the same on every pass",
                value="other content at the second reading",
                place=self.place,
                fix=f"turn augmentation off for {self.name}: what is judged on has to stay",
            )
        return split, ("train gives other examples on every pass, so that a stopped run cannot be resumed",)

    def _live(self, data: Any) -> LiveSplit:
        def walk(seed: int | None) -> Iterator[Batch]:
            return self._walk(data, seed)

        length = _length(data, self.place)
        if length is None:
            length = sum(len(targets) for _, targets in self._bounded(walk(None)))
        elif next(walk(None), None) is None:
            length = 0
        if length == 0:
            raise self._empty()
        return LiveSplit(walk, length if self.limit is None else min(length, self.limit), self.name)

    def _walk(self, data: Any, seed: int | None = None, check: bool = True) -> Iterator[Batch]:
        """Yield checked batches of one pass; errors of the source name the example or the batch."""
        source = (
            _examples(data, self.place, seed) if _is_indexed(data, self.place) else _loaded(data, self.place)
        )
        first: Batch | None = None
        for place, raw in source:
            batch = self._arrays(_pair(raw, place), place)
            first = first or batch
            _refuse_another_kind(first, batch, place)
            if check:
                self._check(batch, place)
            yield batch

    def _bounded(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        seen = 0
        for batch in batches:
            yield batch
            seen += len(batch[1])
            if self.limit is not None and seen >= self.limit:
                return
            if self.limit is None and seen > WITHOUT_LENGTH:
                raise Refused(
                    "data without a length must end",
                    value=f"more than {WITHOUT_LENGTH:,} examples",
                    place=self.place,
                    fix="set Task(max_examples=...)",
                )

    def _together(self, batches: list[Batch]) -> Split:
        if sum(len(targets) for _, targets in batches) == 0:
            raise self._empty()
        inputs = tuple(np.concatenate(parts) for parts in zip(*(x for x, _ in batches), strict=True))
        whole = inputs, np.concatenate([y for _, y in batches])
        self._check(whole, self.place)
        return Split(*whole, self.name)

    def _empty(self) -> Refused:
        return Refused(
            "the split must have examples",
            value="0 examples",
            place=self.place,
            fix="pass data; instead of a used iterator a function that makes it",
        )

    def _limited(self, split: Split) -> Split:
        if self.limit is None or len(split) <= self.limit:
            return split
        chosen = np.random.default_rng(self.seed).permutation(len(split))[: self.limit]
        return split.take(np.sort(chosen), self.name)

    def _arrays(self, pair: tuple[tuple[Any, ...], Any], place: str) -> Batch:
        inputs = tuple(as_input(x, f"{place}, input {i}") for i, x in enumerate(pair[0]))
        targets = as_target(pair[1], self.labels, f"{place}, targets")
        sizes = {len(x) for x in inputs} | {len(targets)}
        if len(sizes) > 1:
            raise Refused(
                "inputs and targets must have one length",
                value=sorted(sizes),
                place=place,
                fix="give one target for each input",
            )
        return inputs, targets

    def _check(self, batch: Batch, place: str) -> None:
        for i, x in enumerate(batch[0]):
            if x.dtype.kind == "f":
                refuse_not_finite(x, f"{place}, input {i}")
        if batch[1].dtype.kind == "f":
            refuse_not_finite(batch[1], f"{place}, targets")
        if self.labels and len(batch[1]) and batch[1].min() < 0:
            raise Refused(
                "the labels must be class indices from 0",
                place=f"{place}, targets",
                value=f"{int((batch[1] < 0).sum())} negative, {batch[1].min()}..{batch[1].max()}",
                fix="drop these examples or number the classes from 0",
            )


def _examples(data: Any, place: str, seed: int | None) -> Iterator[tuple[str, Any]]:
    """Yield batches of an indexed data set, each as (place, (inputs, targets))."""
    order = np.arange(len(data)) if seed is None else np.random.default_rng(seed).permutation(len(data))
    for start in range(0, len(order), CHUNK):
        items = [_item(data, int(i), place) for i in order[start : start + CHUNK]]
        where = f"{place}, examples {order[start]}.."
        columns = []
        for column in zip(*((*x, y) for x, y in items), strict=True):
            shapes = [a.shape for a in column]
            odd = next((k for k, s in enumerate(shapes) if s != shapes[0]), None)
            if odd is not None:
                raise Refused(
                    "all examples must have one shape",
                    value=f"{shapes[odd]} after {shapes[0]}",
                    place=f"{place}, example {order[start + odd]}",
                    fix="pad, crop or resize the examples to one shape",
                )
            columns.append(np.stack(column))
        yield where, (tuple(columns[:-1]), columns[-1])


def _item(data: Any, index: int, place: str) -> tuple[tuple[NDArray[Any], ...], NDArray[Any]]:
    where = f"{place}, example {index}"
    inputs, target = _pair(attempt(lambda: data[index], where), where)
    return tuple(as_array(x, where) for x in inputs), as_array(target, where)


def _loaded(data: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield batches of a loader, or of what a function makes, each as (place, batch)."""
    iterator = attempt(lambda: iter(data() if _is_factory(data) else data), place)
    done = object()
    index = 0
    while (batch := attempt(lambda: next(iterator, done), f"{place}, batch {index}")) is not done:
        yield f"{place}, batch {index}", batch
        index += 1


def _is_factory(data: Any) -> bool:
    return callable(data) and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__")


def _is_indexed(data: Any, place: str) -> bool:
    """Tell a data set of single examples from a source of batches; refuse everything else.

    A list may hold either: examples have targets without an axis.
    """
    if hasattr(data, "__next__"):
        raise Refused(
            "the data must be readable more than once",
            value=type(data).__name__,
            place=place,
            fix="the iterator is one-shot: pass a function that makes it",
        )
    if _is_factory(data):
        return False
    if isinstance(data, dict | str | bytes) or not (
        hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise Refused(
            "must be (inputs, targets), a data set, a loader or a function that makes batches",
            value=type(data).__name__,
            place=place,
            fix="pass for example a tuple of two arrays",
        )
    if isinstance(data, list | tuple) and len(data) > 0:
        return as_array(_pair(data[0], place)[1], place).ndim == 0
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _is_pair_of_arrays(data: Any) -> bool:
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    return all(hasattr(x, "shape") and len(x.shape) > 0 for x in (*inputs, data[1])) or (
        isinstance(data, tuple) and all(isinstance(x, list) for x in (*inputs, data[1]))
    )


def _pair(batch: Any, place: str) -> tuple[tuple[Any, ...], Any]:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise Refused(
            "a batch must be (inputs, targets)",
            value=type(batch).__name__,
            place=place,
            fix="let the data give a tuple, targets last",
        )
    inputs = batch[:-1] if len(batch) > 2 else batch[0]
    return (
        tuple(inputs) if isinstance(inputs, tuple | list) and _holds_arrays(inputs) else (inputs,)
    ), batch[-1]


def _holds_arrays(inputs: Any) -> bool:
    return len(inputs) > 0 and all(hasattr(x, "shape") for x in inputs)


def _length(data: Any, place: str) -> int | None:
    """Return the number of examples where the source knows it: a data set, or a loader's sampler."""
    for counted in (getattr(data, "sampler", None), data if _is_indexed(data, place) else None):
        try:
            return len(counted)  # type: ignore[arg-type]
        except TypeError:
            continue
    return None


def _batch_size(data: Any) -> int | None:
    size = getattr(data, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _refuse_another_kind(first: Batch, batch: Batch, place: str) -> None:
    for a, b in zip((*first[0], first[1]), (*batch[0], batch[1]), strict=False):
        if a.dtype != b.dtype or a.shape[1:] != b.shape[1:] or len(first[0]) != len(batch[0]):
            raise Refused(
                "all batches must have one shape and type",
                place=place,
                value=f"{b.dtype} {b.shape[1:]} after {a.dtype} {a.shape[1:]}",
                fix="pad, crop or cast the examples to one shape and type",
            )


def _cast(given: tuple[Any, ...], read: Arrays) -> tuple[str, ...]:
    wide = [x for x in given if str(getattr(x, "dtype", "")).endswith("float64")]
    return ("float64 inputs were cast to float32",) if wide and read[0].dtype == np.float32 else ()
