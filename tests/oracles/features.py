"""The losses of distillation from features, in NumPy: slow, readable, and checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.distillation import SMALL, log_softmax


def relative_squares(student: NDArray[Any], teacher: NDArray[Any]) -> float:
    """Return the squared difference of two arrays over the sum of the teacher's squares.

    1 for a student that gives zeros, whatever the scale of the features. Sources: Romero et al., FitNets:
    Hints for Thin Deep Nets, ICLR 2015 (the squares); Bercovich et al., Puzzle: Distillation-Based NAS for
    Inference-Optimized LLMs, 2024 (divided by the teacher's).

    >>> relative_squares(np.zeros(3), np.array([5.0, 1, 2]))
    1.0
    """
    a, b = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    return float(((a - b) ** 2).sum() / max((b**2).sum(), SMALL))


def attention_map(features: NDArray[Any]) -> NDArray[np.float64]:
    """Return where a layer is active: the mean square over channels, of length 1 for each example.

    Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, with
    p = 2.

    Args:
        features: `[n, channels, *positions]`, or `[n, positions, channels]` with three axes.

    Returns:
        `[n, positions]`.
    """
    x = np.asarray(features, np.float64)
    maps = (x**2).mean(axis=-1 if x.ndim == 3 else 1).reshape(len(x), -1)
    return np.asarray(maps / np.maximum(np.linalg.norm(maps, axis=1, keepdims=True), SMALL))


def attention_loss(student: NDArray[Any], teacher: NDArray[Any]) -> float:
    """Return the mean squared difference of two attention maps; channels may differ in number."""
    return float(((attention_map(student) - attention_map(teacher)) ** 2).mean())


def embedded(features: NDArray[Any]) -> NDArray[np.float64]:
    """Return one vector for each example: features averaged over positions, `[n, channels]`."""
    x = np.asarray(features, np.float64)
    axes = (1,) if x.ndim == 3 else tuple(range(2, x.ndim))
    return np.asarray(x.mean(axis=axes) if axes else x)


def smooth(difference: NDArray[Any]) -> float:
    """Return the mean of Huber's function: `d² / 2` where `|d| < 1`, else `|d| - 1 / 2`."""
    d = np.abs(difference)
    return float(np.where(d < 1, 0.5 * d**2, d - 0.5).mean())


def distances(x: NDArray[Any]) -> NDArray[np.float64]:
    """Return the distances of vectors `[n, width]` from each other over their mean, `[n, n]`."""
    found = np.linalg.norm(x[:, None] - x[None], axis=-1)
    away = ~np.eye(len(x), dtype=bool)
    return np.asarray(found / max(found[away].mean() if len(x) > 1 else 0.0, SMALL))


def cosines(x: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine of the angle at j between i and k, `[j, i, k]`, of vectors `[n, width]`."""
    e = x[None] - x[:, None]
    e = e / np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), SMALL)
    return np.asarray(e @ e.transpose(0, 2, 1))


def relational_loss(student: NDArray[Any], teacher: NDArray[Any], parts: tuple[float, float]) -> float:
    """Return how differently two embeddings lay the examples of a batch out.

    `parts[0]` times Huber's mean difference of distances, plus `parts[1]` times that of cosines of angles.

    Source: Park et al., Relational Knowledge Distillation, CVPR 2019.

    Args:
        student, teacher: `[n, width]`; the widths may differ.
        parts: weights; the paper's are 25 and 50.
    """
    far = smooth(distances(student) - distances(teacher))
    return parts[0] * far + parts[1] * smooth(cosines(student) - cosines(teacher))


def relation_loss(
    student: NDArray[Any], teacher: NDArray[Any], heads: int, seen: NDArray[np.bool_] | None = None
) -> float:
    """Return the divergence of how tokens relate to each other, the mean over heads and tokens.

    A relation is the softmax over tokens of the scaled products of one kind of vector with itself: queries,
    keys or values.

    Source: Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, ACL Findings 2021.

    Args:
        student, teacher: `[n, tokens, width]`; the widths may differ.
        heads: relation heads that both widths are divided into.
        seen: `[n, tokens]`, False where there is no token; all by default.
    """
    n, tokens, _ = np.shape(student)
    seen = np.ones((n, tokens), bool) if seen is None else seen
    logs = []
    for x in (teacher, student):
        v = np.asarray(x, np.float64).reshape(n, tokens, heads, -1).transpose(0, 2, 1, 3)
        products = v @ v.transpose(0, 1, 3, 2) / np.sqrt(v.shape[-1])
        logs.append(log_softmax(np.where(seen[:, None, None, :], products, -1e30)))
    log_p, log_q = logs
    rows = np.where(seen[:, None, None, :], np.exp(log_p) * (log_p - log_q), 0.0).sum(axis=-1)
    return float((rows * seen[:, None, :]).sum() / max(heads * seen.sum(), 1))


def attention_scores(query: NDArray[Any], key: NDArray[Any], heads: int, scale: float) -> NDArray[np.float64]:
    """Return the products of queries and keys before the softmax, `[n, heads, tokens, tokens]`.

    Args:
        query: `[n, tokens, width]`, the heads side by side.
        key: `[n, tokens, width]`, or of fewer heads that divide them: each serves as many in a row.
        heads: of the queries.
        scale: of the products.
    """
    n, tokens, width = np.shape(query)
    each = width // heads
    q, k = (
        np.asarray(x, np.float64).reshape(n, tokens, -1, each).transpose(0, 2, 1, 3) for x in (query, key)
    )
    return np.asarray(q @ k.repeat(heads // k.shape[1], axis=1).transpose(0, 1, 3, 2) * scale)


def score_loss(student: NDArray[Any], teacher: NDArray[Any], pairs: NDArray[np.bool_] | None = None) -> float:
    """Return the mean squared difference of two arrays of attention scores.

    Source: Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, EMNLP Findings 2020,
    formula (7): scores before the softmax.

    Args:
        student, teacher: `[n, heads, tokens, tokens]`.
        pairs: of the same shape, False where a query does not see a key; all count by default.
    """
    squares = (np.asarray(student, np.float64) - np.asarray(teacher, np.float64)) ** 2
    return float(squares.mean() if pairs is None else squares[pairs].sum() / max(pairs.sum(), 1))
