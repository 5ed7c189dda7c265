"""A task: data in three splits, the loss that trains and the metric that judges."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from penjing.core.data import Arrays, Batch, LiveSplit, Split, divide, row_hashes
from penjing.core.errors import Exit, Refused
from penjing.core.reading import Reader

__all__ = ["Arrays", "Batch", "LiveSplit", "Split", "Task"]

SMALL_TEST = 300
HELD_BACK = 0.15
"""Share of the training data taken for each of valid and test where it is missing."""
HASHED_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Task:
    """Data, loss and metric.

    Attributes:
        train, valid, test: `(x, y)` arrays or tensors (`x` may be a tuple of inputs), a map-style data
            set, a re-iterable loader, or a function that makes an iterator of batches. Training data other
            than arrays is read anew on every pass; the other two are read once. Without `test`, half of
            `valid` is held back; without `valid`, a part of `train`.
        loss: `cross_entropy`, or a function of (outputs, targets) in the model's framework.
        metric: a name, or a function of (outputs, targets) as NumPy arrays that returns a number.
        direction: `maximize` or `minimize`; needed for a function.
        metric_range: least and greatest value of a metric that is a function, for one example (0 and 5 for
            an absolute error that is at most 5, 0 and 1 for NDCG). Values beyond it are clipped where a drop
            is certified; without it no drop of such a metric can be.
        output: which output counts where the model returns several: a key, an index or a function.
        batch_size: of training and evaluation.
        class_names: for the report.
        max_examples: of each split; needed for data without an end.
        notes: what `prepare` found or did.
        prepared: whether the splits are read and checked.
    """

    train: Any
    valid: Any = None
    test: Any = None
    loss: str | Callable[..., Any] = "cross_entropy"
    metric: str | Callable[..., float] = "accuracy"
    direction: Literal["maximize", "minimize"] | None = None
    metric_range: tuple[float, float] | None = None
    output: int | str | Callable[..., Any] | None = None
    batch_size: int = 128
    class_names: tuple[str, ...] = ()
    max_examples: int | None = None
    notes: tuple[str, ...] = field(default=())
    prepared: bool = field(default=False, repr=False)

    def prepare(self, seed: int = 0) -> Task:
        """Return the same task with every split read, checked and made if it was missing.

        Args:
            seed: of the division where a split is missing.

        Raises:
            Refused: data that cannot be read, trained or judged on, or a metric without a direction.
        """
        if self.prepared:
            return self
        self._check_settings()
        self._refuse_same_data()
        splits, notes = self._read(seed)
        splits, made = _complete(splits, seed)
        _refuse_different_examples(splits)
        if self.test is not None:
            _refuse_equal_content(splits["valid"], splits["test"])
        found = (*notes, *made, *_observations(splits))
        return replace(self, **splits, notes=(*self.notes, *dict.fromkeys(found)), prepared=True)

    def check_labels(self, outputs: int) -> None:
        """Refuse labels that a model with so many outputs cannot predict, and names that do not fit.

        Raises:
            Refused: a label outside 0..outputs-1, or another number of class names.
        """
        if not self._labelled:
            return
        for name in ("train", "valid", "test"):
            split = getattr(self, name)
            targets = split.targets if isinstance(split, Split) else next(split.batches(self.batch_size))[1]
            if targets.max() >= outputs:
                raise Refused(
                    f"the labels must lie in 0..{outputs - 1}, as the model has {outputs} outputs",
                    value=f"{targets.min()}..{targets.max()}",
                    place=f"task.{name}, targets",
                    fix="give the model one output for each class",
                )
        if self.class_names and len(self.class_names) != outputs:
            raise Refused(
                f"must have one name for each of {outputs} outputs",
                value=len(self.class_names),
                place="task.class_names",
                fix="name every output, or leave class_names out",
            )

    def fingerprint(self) -> str:
        """Return a SHA-256 over the three splits; the order of examples counts."""
        parts = [getattr(self.prepare(), name).fingerprint() for name in ("train", "valid", "test")]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    @property
    def _labelled(self) -> bool:
        return self.loss == "cross_entropy" or isinstance(self.metric, str)

    def _check_settings(self) -> None:
        if callable(self.metric) and self.direction is None:
            raise Refused(
                "a metric that is a function needs a direction",
                place="task.direction",
                value=getattr(self.metric, "__name__", "a function"),
                code=Exit.USAGE,
                fix='pass direction="maximize" or "minimize"',
            )
        self._check_range()
        for name, value in (("batch_size", self.batch_size), ("max_examples", self.max_examples)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise Refused(
                    "must be a whole number of at least 1",
                    value=repr(value),
                    place=f"task.{name}",
                    code=Exit.USAGE,
                    fix="128 is the default of batch_size; max_examples may be left out",
                )

    def _check_range(self) -> None:
        ends = self.metric_range
        if ends is None:
            return
        if isinstance(self.metric, str):
            raise Refused(
                "cannot be given for a named metric, whose range is known",
                value=f"{ends} for {self.metric}",
                place="task.metric_range",
                fix="leave metric_range out",
                code=Exit.USAGE,
            )
        numbers = isinstance(ends, tuple | list) and len(ends) == 2 and all(map(_is_number, ends))
        if not numbers or not ends[0] < ends[1]:
            raise Refused(
                "must be two finite numbers in order",
                value=repr(ends),
                place="task.metric_range",
                fix="give the least and the greatest value of one example, such as (0, 5)",
                code=Exit.USAGE,
            )

    def _refuse_same_data(self) -> None:
        for other in ("valid", "train"):
            if self.test is not None and self.test is getattr(self, other):
                raise _seen_test(other)

    def _read(self, seed: int) -> tuple[dict[str, Any], list[str]]:
        splits: dict[str, Any] = {"train": None, "valid": None, "test": None}
        notes: list[str] = []
        for name in splits:
            data = getattr(self, name)
            if data is None and name != "train":
                continue
            reader = Reader(name, self._labelled, self.max_examples, seed)
            splits[name], said = reader.read(data, live=name == "train" and self.valid is not None)
            notes += said
        if self.valid is None and not isinstance(self.train, tuple | list | Split):
            notes.append("training data was read once to take valid from it; its augmentation does not vary")
        if self.valid is not None and self.valid is self.train:
            notes.append("valid is train: the search sees the examples that it trained on")
        return splits, notes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _complete(splits: dict[str, Any], seed: int) -> tuple[dict[str, Any], list[str]]:
    """Make the splits that are missing, the same share of every class, and say so."""
    notes: list[str] = []
    train, valid, test = (splits[name] for name in ("train", "valid", "test"))
    if valid is None:
        share = HELD_BACK if test is not None else 2 * HELD_BACK
        train, valid = _halves(train, ("train", "valid"), share, seed)
        notes.append(f"valid was not given: {share:.0%} of train was taken for it")
    if test is None:
        valid, test = _halves(valid, ("valid", "test"), 0.5, seed)
        notes.append(f"test was not given: half of valid ({len(test)} examples) was held back for it")
    return {"train": train, "valid": valid, "test": test}, notes


def _halves(split: Split, names: tuple[str, str], share: float, seed: int) -> tuple[Split, Split]:
    rest, drawn = divide(split.targets, share, seed)
    if len(rest) == 0 or len(drawn) == 0:
        raise Refused(
            f"{names[0]} must have enough examples to take {names[1]} from",
            value=len(split),
            place=f"task.{names[0]}",
            fix=f"pass {names[1]}",
        )
    return split.take(rest, names[0]), split.take(drawn, names[1])


def _refuse_different_examples(splits: dict[str, Any]) -> None:
    kinds = {name: [(x.dtype, x.shape[1:]) for x in split.example()] for name, split in splits.items()}
    for name in ("valid", "test"):
        if kinds[name] != kinds["train"]:
            both = f"{_kinds(kinds[name])} beside {_kinds(kinds['train'])} in train"
            raise Refused(
                "the examples of all splits must have one shape and type",
                value=both,
                place=f"task.{name}",
                fix="prepare every split in the same way",
            )


def _kinds(kinds: list[tuple[Any, tuple[int, ...]]]) -> str:
    return ", ".join(f"{dtype} {shape}" for dtype, shape in kinds)


def _refuse_equal_content(valid: Split, test: Split) -> None:
    if len(valid) == len(test) and all(
        np.array_equal(a, b) for a, b in zip(valid.inputs, test.inputs, strict=True)
    ):
        raise _seen_test("valid")


def _seen_test(other: str) -> Refused:
    return Refused(
        "the test split must be unseen by the search",
        value=f"test is {other}",
        place="task.test",
        fix="leave test out: half of valid is then held back for it",
    )


def _observations(splits: dict[str, Any]) -> list[str]:
    """Return what a reader of the report should know: overlaps, few examples, one class, constant inputs."""
    notes: list[str] = []
    arrays = {name: split for name, split in splits.items() if isinstance(split, Split)}
    if sum(x.nbytes for split in arrays.values() for x in split.inputs) <= HASHED_BYTES:
        hashes = {name: row_hashes(split.inputs) for name, split in arrays.items()}
        for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
            if first in hashes:
                seen = set(hashes[first])
                count = sum(h in seen for h in hashes[second])
                notes += [f"{count} of {len(hashes[second])} examples of {second} are also in {first}"] * (
                    count > 0
                )
    n = len(splits["test"])
    if n < SMALL_TEST:
        notes.append(
            f"test has {n} examples: drops below about {min(1.0, 3 / n):.1%} cannot be certified at 95%"
        )
    for name, split in arrays.items():
        if split.targets.ndim == 1 and split.targets.dtype.kind in "iu" and np.ptp(split.targets) == 0:
            notes.append(f"{name} has only one class ({split.targets[0]})")
        if any(x.dtype.kind == "f" and np.ptp(x) == 0 for x in split.inputs):
            notes.append(f"an input of {name} has the same value everywhere")
    return notes
