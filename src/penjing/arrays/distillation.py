"""The mathematics of distillation from logits, in NumPy; the oracle of the losses that train."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-6
"""Added to the variance, so that a constant row has a finite gradient."""


def standardize(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return logits `[n, classes]` with mean 0 and standard deviation 1 in every row.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024. A student need not
    match the scale of its teacher's logits, only their relations. A constant row becomes zeros.

    >>> standardize(np.array([[1.0, 3.0], [2.0, 2.0]])).round(3).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    z = np.asarray(logits, dtype=np.float64)
    return np.asarray((z - z.mean(axis=-1, keepdims=True)) / np.sqrt(z.var(axis=-1, keepdims=True) + EPSILON))


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


def hinton_gradient(student: NDArray[Any], teacher: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return the gradient of `hinton_loss` with respect to the student's logits, `[n, classes]`."""
    p, q = (np.exp(log_softmax(np.asarray(z) / temperature)) for z in (teacher, student))
    return np.asarray(temperature * (q - p) / len(q))
