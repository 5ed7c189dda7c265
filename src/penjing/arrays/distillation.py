"""Distillation on arrays: Hinton's loss between outputs, and which layers belong to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-6
"""Added to the variance, so that a constant row has a finite gradient."""

SMALL = 1e-8
"""Least length of a vector that is divided by it."""


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the logarithm of the softmax over the last axis, safe for large logits."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def hinton_loss(student: NDArray[Any], teacher: NDArray[Any], temperature: float) -> float:
    """Return `T² KL(softmax(teacher / T) || softmax(student / T))`, the mean over rows `[n, classes]`.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015. T² keeps the
    size of the gradient independent of the temperature `T > 0`.

    >>> hinton_loss(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]]), 4.0)
    0.0
    """
    log_p, log_q = (
        log_softmax(np.asarray(teacher) / temperature),
        log_softmax(np.asarray(student) / temperature),
    )
    rows = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return float(temperature**2 * rows.mean())


def uniform_mapping(student: int, teacher: int) -> tuple[int, ...]:
    """Return, for each of a student's layers, which of a teacher's belongs to it.

    The i-th of m belongs to the i n / m-th of n, rounded up (the uniform strategy of Jiao et al.,
    TinyBERT: Distilling BERT for Natural Language Understanding, EMNLP Findings 2020).

    Args:
        student, teacher: numbers of layers, at least 1.

    >>> uniform_mapping(2, 6), uniform_mapping(3, 2)
    ((2, 5), (0, 1, 1))
    """
    return tuple(-(-(i + 1) * teacher // student) - 1 for i in range(student))
