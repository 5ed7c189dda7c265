"""A task: data in three splits, the loss that trains and the metric that judges."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from penjing.core.data.copies import counted_once, refuse_overlaps
from penjing.core.data.groups import groups_by_split, groups_of, refuse_shared_groups
from penjing.core.data.missing import complete, observations, refuse_different_examples
from penjing.core.data.reading import Reader
from penjing.core.data.split import Arrays, Batch, LiveSplit, Split
from penjing.core.errors import Exit, Refused
from penjing.core.kind import KINDS, Kind

__all__ = ["Arrays", "Batch", "LiveSplit", "Split", "Task"]


@dataclass(frozen=True)
class Task:
    """Data, loss and metric.

    Attributes:
        train, valid, test: `(x, y)` arrays or tensors (`x` may be a tuple of inputs), a map-style data
            set, a re-iterable loader, or a function that makes an iterator of batches. Training data other
            than arrays is read anew on every pass; the other two are read once. Without `test`, half of
            `valid` is held back; without `valid`, a part of `train`.
        loss: of classes `cross_entropy`; of labels that may hold together, one logit or several,
            `binary_cross_entropy` (`bce`); of numbers `mse`, `mae` or `huber`; or a function of (outputs,
            targets) in the model's framework. Other losses than `cross_entropy` need a `metric` that is a
            function.
        metric: a name, or a function of (outputs, targets) as NumPy arrays that returns a number.
        direction: `maximize` or `minimize`; needed for a function.
        metric_range: least and greatest value of a metric that is a function, for one example (0 and 5 for
            an absolute error that is at most 5, 0 and 1 for NDCG). Values beyond it are clipped where a drop
            is certified; without it no drop of such a metric can be.
        output: which output counts where the model returns several: a key, an index or a function.
        batch_size: of training and evaluation.
        class_names: for the report.
        max_examples: of each split; needed for data without an end.
        groups: what each example of test belongs to (a patient, a user, a document), `[n]`; or such arrays by
            the name of the split. Examples of a group depend on each other: the certificate counts groups, a
            missing split is divided by them, and a group in two splits counts as seen.
        max_overlap: largest share of valid or test whose inputs, or groups, may also be in a split before it.
        notes: what `prepare` found or did.
        prepared: whether the splits are read and checked.

    >>> import numpy as np
    >>> x, y = np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 4
    >>> task = Task(train=(x, y)).prepare()
    >>> len(task.train), len(task.valid), len(task.test)
    (140, 30, 30)
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
    groups: Any = None
    max_overlap: float = 0.1
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
        splits, made = complete(splits, seed)
        splits["test"], copies = counted_once(splits["test"])
        refuse_different_examples(splits)
        overlaps = refuse_overlaps(splits, self.max_overlap, self.valid is self.train)
        overlaps += refuse_shared_groups(
            groups_of(splits, groups_by_split(self.groups, self._given)), self.max_overlap
        )
        found = (*notes, *made, *([copies] if copies else []), *overlaps, *observations(splits))
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
    def _given(self) -> tuple[str, ...]:
        return tuple(name for name in ("train", "valid", "test") if getattr(self, name) is not None)

    @property
    def _labelled(self) -> bool:
        if isinstance(self.loss, str):
            return KINDS.get(self.loss) is Kind.CLASSES
        return isinstance(self.metric, str)

    def _check_settings(self) -> None:
        if callable(self.metric) and self.direction is None:
            raise Refused(
                "a metric that is a function needs a direction",
                place="task.direction",
                value=getattr(self.metric, "__name__", "a function"),
                code=Exit.USAGE,
                fix='pass direction="maximize" or "minimize"',
            )
        if isinstance(self.metric, str) and KINDS.get(str(self.loss), Kind.CLASSES) is not Kind.CLASSES:
            raise Refused(
                f"must be a function with the loss {self.loss!r}, for named metrics judge classes",
                value=repr(self.metric),
                place="task.metric",
                fix='pass metric=a function of (outputs, targets) and direction="maximize" or "minimize"',
                code=Exit.USAGE,
            )
        self._check_range()
        if not _is_number(self.max_overlap) or not 0 <= self.max_overlap <= 1:
            raise Refused(
                "must be a share from 0 to 1",
                value=repr(self.max_overlap),
                place="task.max_overlap",
                fix="give the share of test that may also be in train or valid; 0.1 is the default",
                code=Exit.USAGE,
            )
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
        groups = groups_by_split(self.groups, self._given)
        for name in splits:
            data = getattr(self, name)
            if data is None and name != "train":
                continue
            reader = Reader(name, self._labelled, self.max_examples, seed)
            live = name == "train" and self.valid is not None
            splits[name], said = reader.read(data, live, groups.get(name))
            notes += said
        if self.valid is None and not isinstance(self.train, tuple | list | Split):
            notes.append("training data was read once to take valid from it; its augmentation does not vary")
        if self.valid is not None and self.valid is self.train:
            notes.append("valid is train: the search sees the examples that it trained on")
        return splits, notes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _seen_test(other: str) -> Refused:
    return Refused(
        "the test split must be unseen by the search",
        value=f"test is {other}",
        place="task.test",
        fix="leave test out: half of valid is then held back for it",
    )
