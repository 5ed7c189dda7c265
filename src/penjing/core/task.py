"""A task: data in three splits, the loss that trains and the metric that judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused

Arrays = tuple[NDArray[Any], ...]
Batch = tuple[Arrays, NDArray[Any]]


class Split:
    """One part of the data: batches of NumPy arrays that can be walked any number of times.

    `batches(size, seed)` yields `(inputs, targets)`; with a seed in shuffled order. `arrays()` returns
    everything at once. `len()` is the number of examples.
    """

    def __init__(self, inputs: Arrays, targets: NDArray[Any], name: str) -> None:
        self.inputs = inputs
        self.targets = targets
        self.name = name

    def __len__(self) -> int:
        return len(self.targets)

    def arrays(self) -> Batch:
        """Return all inputs and all targets."""
        return self.inputs, self.targets

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `size` examples."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(order), size):
            index = order[start : start + size]
            if seed is None:
                window = slice(start, start + size)
                yield tuple(x[window] for x in self.inputs), self.targets[window]
            else:
                yield tuple(x[index] for x in self.inputs), self.targets[index]

    def example(self) -> Arrays:
        """Return the first example as a batch of one."""
        return tuple(x[:1] for x in self.inputs)


@dataclass(frozen=True)
class Task:
    """Data, loss and metric.

    Attributes:
        train, valid, test: `(x, y)` arrays or tensors (`x` may be a tuple of inputs), a map-style data
            set, a re-iterable loader, or a function that makes an iterator of batches.
        loss: `cross_entropy`, or a function of (outputs, targets) in the model's framework.
        metric: a name, or a function of (outputs, targets) as NumPy arrays that returns a number.
        direction: `maximize` or `minimize`; needed for a function.
        output: which output counts where the model returns several: a key, an index or a function.
        batch_size: of training and evaluation.
        class_names: for the report.
    """

    train: Any
    valid: Any = None
    test: Any = None
    loss: str | Callable[..., Any] = "cross_entropy"
    metric: str | Callable[..., float] = "accuracy"
    direction: Literal["maximize", "minimize"] | None = None
    output: int | str | Callable[..., Any] | None = None
    batch_size: int = 128
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def prepare(self) -> Task:
        """Return the same task with every split read, checked and made if it was missing."""
        if isinstance(self.train, Split):
            return self
        train, valid, test = (_split(getattr(self, n), n) for n in ("train", "valid", "test"))
        return replace(self, train=train, valid=valid, test=test)


def _split(data: Any, name: str) -> Split:
    if data is None:
        raise Refused("the split is given", place=f"task.{name}")
    x, y = data
    inputs = tuple(x) if isinstance(x, tuple) else (x,)
    return Split(tuple(np.asarray(a) for a in inputs), np.asarray(y), name)
