"""Losses of distillation from features, on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from penjing.arrays.distillation import SMALL

TRIPLES = 128
"""Examples of a batch whose angles are compared at most; they are the third power of it."""


def relative_squares(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference of two tensors over the sum of the teacher's squares.

    >>> relative_squares(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
    tensor(0.2000)
    """
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=SMALL)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two attention maps of features."""
    return functional.mse_loss(_map(student), _map(teacher))


def _map(x: Tensor) -> Tensor:
    maps = x.square().mean(dim=-1 if x.ndim == 3 else 1).flatten(1)
    return functional.normalize(maps, dim=1, eps=SMALL)


def pool_positions(x: Tensor) -> Tensor:
    """Return features averaged over positions, `[n, channels]`.

    >>> pool_positions(torch.ones(2, 3, 4, 4)).shape, pool_positions(torch.ones(2, 5, 3)).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if x.ndim == 3:
        return x.mean(dim=1)
    return x.flatten(2).mean(dim=2) if x.ndim > 2 else x


def relational_loss(student: Tensor, teacher: Tensor, balance: tuple[float, float]) -> Tensor:
    """Return how differently two embeddings `[n, width]` lay the examples out.

    Angles are those of the first 128 examples of a batch.
    """
    far = functional.smooth_l1_loss(_distances(student), _distances(teacher))
    angles = functional.smooth_l1_loss(_cosines(student[:TRIPLES]), _cosines(teacher[:TRIPLES]))
    return balance[0] * far + balance[1] * angles


def _distances(x: Tensor) -> Tensor:
    n = len(x)
    found = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return found / (found.sum() / max(n * (n - 1), 1)).clamp(min=SMALL)


def _cosines(x: Tensor) -> Tensor:
    e = x[None] - x[:, None]
    squares = e.square().sum(dim=-1, keepdim=True)
    e = e / squares.clamp(min=SMALL**2).sqrt()
    return e @ e.mT


def relation_loss(student: Tensor, teacher: Tensor, heads: int, seen: Tensor | None) -> Tensor:
    """Return the divergence of the relations of tokens `[n, tokens, width]`; `seen` is `[n, tokens]`."""
    n, tokens, _ = student.shape
    if seen is None:
        seen = torch.ones(n, tokens, dtype=torch.bool, device=student.device)
    log_p, log_q = (_relations(x, heads, seen) for x in (teacher, student))
    rows = torch.where(seen[:, None, None, :], log_p.exp() * (log_p - log_q), 0.0).sum(dim=-1)
    return (rows * seen[:, None, :]).sum() / (heads * seen.sum()).clamp(min=1)


def _relations(x: Tensor, heads: int, seen: Tensor) -> Tensor:
    v = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    products = v @ v.mT / v.shape[-1] ** 0.5
    return functional.log_softmax(products.masked_fill(~seen[:, None, None, :], -1e30), dim=-1)


def attention_scores(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Return the scaled products `[n, heads, tokens, tokens]` of queries and keys `[n, tokens, width]`."""
    q = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    k = key.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
    return q @ k.repeat_interleave(heads // k.shape[1], dim=1).mT * scale


def score_loss(student: Tensor, teacher: Tensor, pairs: Tensor | None) -> Tensor:
    """Return the mean squared difference of scores over the pairs of tokens that count."""
    squares = (student - teacher).square()
    if pairs is None:
        return squares.mean()
    return torch.where(pairs, squares, 0.0).sum() / pairs.sum().clamp(min=1)
