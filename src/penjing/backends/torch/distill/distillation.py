"""Losses of distillation from outputs, on torch tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from penjing.arrays.distillation import EPSILON, SMALL


def standardize(logits: Tensor) -> Tensor:
    """Return logits with mean 0 and standard deviation 1 over the last axis.

    >>> standardize(torch.tensor([[1.0, 3.0]])).round(decimals=3)
    tensor([[-1.,  1.]])
    """
    variance = logits.var(dim=-1, keepdim=True, correction=0)
    return (logits - logits.mean(dim=-1, keepdim=True)) / (variance + EPSILON).sqrt()


def hinton_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return Hinton's loss of rows of logits `[n, classes]`: the mean divergence times temperature squared.

    >>> hinton_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=2.0)
    tensor(0.)
    """
    log_q, log_p = (functional.log_softmax(z / temperature, dim=-1) for z in (student, teacher))
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def decoupled_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, balance: tuple[float, float], temperature: float
) -> Tensor:
    """Return the loss of decoupled distillation of rows of logits `[n, classes]`; labels are `[n]`."""
    own = functional.one_hot(labels.long(), student.shape[-1]).bool()
    targets, others = [], []
    for z in (teacher, student):
        scaled = z / temperature
        total = scaled.masked_fill(own, -torch.inf).logsumexp(dim=-1, keepdim=True)
        targets.append(functional.log_softmax(torch.cat([scaled[own][:, None], total], dim=-1), dim=-1))
        others.append((scaled - total).masked_fill(own, 0.0))
    target = functional.kl_div(targets[1], targets[0], reduction="batchmean", log_target=True)
    apart = (others[0].exp() * (others[0] - others[1])).sum(dim=-1).mean()
    return temperature**2 * (balance[0] * target + balance[1] * apart)


def correlation_loss(
    student: Tensor, teacher: Tensor, balance: tuple[float, float], temperature: float
) -> Tensor:
    """Return the loss of distillation by correlation of rows of logits `[n, classes]`."""
    p, q = (functional.softmax(z / temperature, dim=-1) for z in (teacher, student))
    between, within = 1 - _correlation(q, p).mean(), 1 - _correlation(q.T, p.T).mean()
    return temperature**2 * (balance[0] * between + balance[1] * within)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x - x.mean(dim=-1, keepdim=True) for x in (a, b))
    lengths = (torch.linalg.vector_norm(x, dim=-1).clamp(min=SMALL) for x in (a, b))
    return (a * b).sum(dim=-1) / (next(lengths) * next(lengths))


def squared_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of outputs of one shape.

    >>> squared_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    return functional.mse_loss(student, teacher)


def sigmoid_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence of independent labels, logits `[n, labels]` or `[n]`, times temperature squared.

    The sum over the labels of a row, which is the divergence of all of them together, and the mean over rows.

    >>> sigmoid_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]]), temperature=2.0).item()
    0.0
    """
    wanted = (teacher / temperature).sigmoid()
    entropy = functional.binary_cross_entropy_with_logits
    gap = entropy(student / temperature, wanted, reduction="none") - entropy(
        teacher / temperature, wanted, reduction="none"
    )
    return temperature**2 * (gap.sum(dim=-1) if gap.ndim > 1 else gap).mean()


def softened_labels(logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Return logits of the weighted mean probability of several teachers' labels `[n, teachers, ...]`.

    >>> softened_labels(torch.tensor([[[1.0], [-1.0]]]), torch.tensor([1.0, 1.0]), temperature=1.0)
    tensor([[0.]])
    """
    share = (weights / weights.sum()).view(1, -1, *[1] * (logits.ndim - 2))
    return temperature * ((logits / temperature).sigmoid() * share).sum(dim=1).logit(eps=SMALL)


def listwise_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence of two rankings of rows of scores `[n, candidates]`."""
    there = teacher.isfinite()
    there = there & (there.sum(dim=-1, keepdim=True) > 1)
    log_p, log_q = (
        functional.log_softmax((z / temperature).masked_fill(~there, -1e30), dim=-1)
        for z in (teacher, student)
    )
    found = torch.where(there, log_p.exp() * (log_p - log_q), 0.0)
    return temperature**2 * found.sum() / len(teacher)


def generalized_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of rows of logits `[n, classes]`, `beta` in [0, 1]."""
    log_p, log_q = (functional.log_softmax(z, dim=-1) for z in (teacher, student))
    if beta in (0, 1):
        a, b = (log_p, log_q) if beta == 0 else (log_q, log_p)
        return _divergence(a, b)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _divergence(log_p, log_m) + (1 - beta) * _divergence(log_q, log_m)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def softened_mean(logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Return logits whose softmax is the weighted mean of several teachers' `[n, teachers, ..., classes]`.

    >>> logits = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    >>> softened_mean(logits, torch.tensor([1.0, 1.0]), temperature=1.0).exp()
    tensor([[0.7000, 0.3000]])
    """
    log_p = functional.log_softmax(logits / temperature, dim=-1)
    share = (weights / weights.sum()).log().view(1, -1, *[1] * (logits.ndim - 2))
    return temperature * (log_p + share).logsumexp(dim=1)
