"""What a task's outputs and targets are: classes, labels that may hold together, or values."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IGNORED_TARGET = -100
"""Class index of a position that does not count."""

LossName = Literal["cross_entropy", "binary_cross_entropy", "bce", "mse", "mae", "huber"]


class Kind(StrEnum):
    """What one output means, which decides the losses that make sense.

    A softmax ties the outputs of `CLASSES` together; `LABELS` and `VALUES` are independent of each other.
    """

    CLASSES = "classes"
    """Logits of classes, of which one is right: targets are class indices or probabilities of classes."""

    LABELS = "labels"
    """Logits of labels, each there or not: one (binary classification) or several (multi-label)."""

    VALUES = "values"
    """Real numbers: regression."""

    OTHER = "other"
    """A loss of the user's, whose targets do not tell."""


KINDS: dict[str, Kind] = {
    "cross_entropy": Kind.CLASSES,
    "binary_cross_entropy": Kind.LABELS,
    "bce": Kind.LABELS,
    "mse": Kind.VALUES,
    "mae": Kind.VALUES,
    "huber": Kind.VALUES,
}
"""By the name of the loss."""

LOSS_NAMES = tuple(KINDS)


def find_kind(loss: str | Callable[..., Any], outputs: tuple[int, ...], targets: NDArray[Any]) -> Kind:
    """Return what a task's outputs are: by the name of its loss, else by shapes and values of its targets.

    Whole targets without an axis of classes are class indices. Targets of the outputs' shape (one column may
    be missing) are labels where all are 0 or 1, classes where rows of several sum to 1, and values otherwise.

    Args:
        loss: of the task.
        outputs: shape of the model's outputs, `(n, ...)`.
        targets: of some examples, `[m, ...]`.

    >>> find_kind("mse", (4, 1), np.zeros(4))
    <Kind.VALUES: 'values'>
    >>> several = np.array([[1, 0, 1], [0, 0, 0]])
    >>> find_kind(print, (4, 3), several), find_kind(print, (4, 3), several[:, 0])
    (<Kind.LABELS: 'labels'>, <Kind.CLASSES: 'classes'>)
    """
    if isinstance(loss, str):
        return KINDS.get(loss, Kind.OTHER)
    out, wanted = outputs[1:], targets.shape[1:]
    if targets.dtype.kind in "iub" and _drops_classes(out, wanted):
        return Kind.CLASSES
    if targets.dtype.kind not in "iubf" or not align_shapes(out, wanted):
        return Kind.OTHER
    rows = targets.reshape(len(targets), -1)
    several = rows.shape[1] > 1
    if several and ((rows >= 0) & (rows <= 1)).all() and np.allclose(rows.sum(axis=1), 1, atol=1e-3):
        return Kind.CLASSES
    return Kind.LABELS if np.isin(rows, (0, 1)).all() else Kind.VALUES


def align_shapes(outputs: tuple[int, ...], targets: tuple[int, ...]) -> bool:
    """Tell whether shapes are the same, but for a last axis of one that either may leave out.

    >>> align_shapes((32, 1), (32,)), align_shapes((32,), (32, 1)), align_shapes((32, 3), (32,))
    (True, True, False)
    """
    return outputs == targets or outputs == (*targets, 1) or targets == (*outputs, 1)


def _drops_classes(outputs: tuple[int, ...], targets: tuple[int, ...]) -> bool:
    """Tell whether targets lack an axis, the first or the last, of at least two classes."""
    if len(outputs) != len(targets) + 1:
        return False
    first = outputs[1:] == targets and outputs[0] > 1
    return first or (outputs[:-1] == targets and outputs[-1] > 1)
