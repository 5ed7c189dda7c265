"""The losses of distillation from outputs, in NumPy: slow, readable, and checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.distillation import EPSILON, SMALL, hinton_loss, log_softmax

__all__ = ["hinton_loss", "log_softmax"]


def standardize(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return logits `[n, classes]` with mean 0 and standard deviation 1 in every row.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024. A student need not
    match the scale of its teacher's logits, only their relations. A constant row becomes zeros.

    >>> standardize(np.array([[1.0, 3.0], [2.0, 2.0]])).round(3).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    z = np.asarray(logits, dtype=np.float64)
    return np.asarray((z - z.mean(axis=-1, keepdims=True)) / np.sqrt(z.var(axis=-1, keepdims=True) + EPSILON))


def hinton_gradient(student: NDArray[Any], teacher: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return the gradient of `hinton_loss` with respect to the student's logits, `[n, classes]`."""
    p, q = (np.exp(log_softmax(np.asarray(z) / temperature)) for z in (teacher, student))
    return np.asarray(temperature * (q - p) / len(q))


def decoupled_loss(
    student: NDArray[Any],
    teacher: NDArray[Any],
    labels: NDArray[np.integer[Any]],
    parts: tuple[float, float],
    temperature: float,
) -> float:
    """Return the loss of decoupled distillation (DKD), the mean over rows `[n, classes]`.

    `parts[0]` times the divergence of "the label's class or another", plus `parts[1]` times the divergence
    of the distributions over the other classes alone, times T². With weights 1 and the teacher's share of
    the other classes (per row) it would be Hinton's loss.

    Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.

    Args:
        student, teacher: logits.
        labels: `[n]` class indices.
        parts: weights of the two.
        temperature: above 0.
    """
    own = np.arange(np.shape(student)[-1]) == np.asarray(labels)[:, None]
    targets, others = [], []
    for z in (teacher, student):
        scaled = np.asarray(z, dtype=np.float64) / temperature
        rest = np.where(own, -np.inf, scaled)
        highest = rest.max(axis=-1, keepdims=True)
        total = highest + np.log(np.exp(rest - highest).sum(axis=-1, keepdims=True))
        targets.append(log_softmax(np.concatenate([scaled[own][:, None], total], axis=-1)))
        others.append(np.where(own, 0.0, scaled - total))
    (log_p, log_q), (log_r, log_s) = targets, others
    target = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()
    other = np.where(own, 0.0, np.exp(log_r) * (log_r - log_s)).sum(axis=-1).mean()
    return float(temperature**2 * (parts[0] * target + parts[1] * other))


def correlation(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return Pearson's correlation of the rows of two arrays `[n, m]`; 0 for a constant row."""
    a, b = (
        x - x.mean(axis=-1, keepdims=True) for x in (np.asarray(a, np.float64), np.asarray(b, np.float64))
    )
    lengths = [np.maximum(np.linalg.norm(x, axis=-1), SMALL) for x in (a, b)]
    return np.asarray((a * b).sum(axis=-1) / (lengths[0] * lengths[1]))


def correlation_loss(
    student: NDArray[Any], teacher: NDArray[Any], parts: tuple[float, float], temperature: float
) -> float:
    """Return the loss of distillation by correlation (DIST) of rows of logits `[n, classes]`.

    `parts[0]` times 1 minus the mean correlation of the softened rows (between the classes of an example),
    plus `parts[1]` times 1 minus that of the columns (within a class, over the examples), times T².

    Source: Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.
    """
    p, q = (np.exp(log_softmax(np.asarray(z) / temperature)) for z in (teacher, student))
    between, within = 1 - correlation(q, p).mean(), 1 - correlation(q.T, p.T).mean()
    return float(temperature**2 * (parts[0] * between + parts[1] * within))


def squared_loss(student: NDArray[Any], teacher: NDArray[Any]) -> float:
    """Return the mean squared difference of outputs of any shape.

    For logits this is Hinton's loss at a high temperature (Kim et al., Comparing Kullback-Leibler Divergence
    and Mean Squared Error Loss in Knowledge Distillation, IJCAI 2021).
    """
    return float(np.mean((np.asarray(student, np.float64) - np.asarray(teacher, np.float64)) ** 2))


def listwise_loss(student: NDArray[Any], teacher: NDArray[Any], temperature: float) -> float:
    """Return the divergence of two rankings, the mean over rows of scores `[n, candidates]`.

    A score's softmax over its row is the probability to be ranked first. A candidate that the teacher
    scores minus infinity (there is none: padding) is left out; a row of fewer than two counts nothing.

    Source: Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach (ListNet), ICML 2007,
    with the teacher's distribution in the place of the judgements', less its entropy.

    >>> listwise_loss(np.array([[1.0, 2.0, 9.0]]), np.array([[1.0, 2.0, -np.inf]]), 1.0)
    0.0
    """
    there = np.isfinite(np.asarray(teacher))
    rows = there.sum(axis=-1) > 1
    if not rows.any():
        return 0.0
    there = there[rows]
    scores = (np.where(there, np.asarray(z)[rows] / temperature, -1e30) for z in (teacher, student))
    log_p, log_q = (log_softmax(z) for z in scores)
    found = np.where(there, np.exp(log_p) * (log_p - log_q), 0.0).sum(axis=-1)
    return float(temperature**2 * found.sum() / len(np.asarray(teacher)))


def generalized_divergence(student: NDArray[Any], teacher: NDArray[Any], beta: float) -> float:
    """Return the generalized Jensen-Shannon divergence, the mean over rows of logits `[n, classes]`.

    With `p` the teacher's softmax, `q` the student's and `m = beta p + (1 - beta) q` it is
    `beta KL(p || m) + (1 - beta) KL(q || m)`, in [0, log 2]. Near the ends it falls as `beta KL(p || q)` and
    `(1 - beta) KL(q || p)`; at 0 and 1 it is those divergences themselves, `KL(p || q)` and `KL(q || p)`.

    Source: Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes,
    ICLR 2024, formulas (1) to (3).

    Args:
        student, teacher: logits.
        beta: in [0, 1].

    >>> generalized_divergence(np.array([[0.0, 0.0]]), np.array([[0.0, np.log(3)]]), 0.0).__round__(4)
    0.1308
    """
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    if beta in (0, 1):
        a, b = (log_p, log_q) if beta == 0 else (log_q, log_p)
        return float((np.exp(a) * (a - b)).sum(axis=-1).mean())
    log_m = np.logaddexp(log_p + np.log(beta), log_q + np.log1p(-beta))
    parts = [(np.exp(x) * (x - log_m)).sum(axis=-1).mean() for x in (log_p, log_q)]
    return float(beta * parts[0] + (1 - beta) * parts[1])


def sigmoid_loss(student: NDArray[Any], teacher: NDArray[Any], temperature: float) -> float:
    """Return the mean over rows of the divergence of independent labels, times temperature squared.

    Args:
        student, teacher: logits `[n, labels]`.
        temperature: above 0.
    """
    p, q = (1 / (1 + np.exp(-np.asarray(z) / temperature)) for z in (teacher, student))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return float(temperature**2 * each.sum(axis=1).mean())


def softened_mean(logits: NDArray[Any], weights: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return logits whose softmax at a temperature is the weighted mean of several teachers'.

    Source: Hinton et al. 2015, section 3 (the soft targets of an ensemble).

    Args:
        logits: `[n, teachers, classes]`.
        weights: `[teachers]`, above 0; they are divided by their sum.
        temperature: above 0.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    p = np.exp(log_softmax(np.asarray(logits) / temperature))
    return np.asarray(temperature * np.log((p * share[:, None]).sum(axis=1)))
