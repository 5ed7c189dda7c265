"""Recommenders: tables of embeddings, crossings, towers and sequences of items."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from architectures.registry import Architecture, seeded

__all__ = ["RECOMMENDERS"]

FIELDS, ROWS, WIDTH, DENSE = 6, 40, 16, 5


def _mlp(*widths: int) -> nn.Sequential:
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


class Dlrm(nn.Module):
    """Dot products of all pairs of embeddings and the bottom MLP's output (Naumov et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = _mlp(DENSE, 32, WIDTH)
        self.tables = nn.ModuleList(nn.EmbeddingBag(ROWS, WIDTH, mode="sum") for _ in range(FIELDS))
        pairs = FIELDS * (FIELDS + 1) // 2
        self.register_buffer("pairs", torch.tril_indices(FIELDS + 1, FIELDS + 1, -1), persistent=False)
        self.top = _mlp(pairs + WIDTH, 32, 1)

    def forward(self, dense, sparse):
        x = self.bottom(dense)
        vectors = [x] + [table(sparse[:, i : i + 1]) for i, table in enumerate(self.tables)]
        stacked = torch.stack(vectors, dim=1)
        crossed = torch.bmm(stacked, stacked.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, crossed], dim=1))


class DeepFm(nn.Module):
    """A factorization machine beside an MLP on the same embeddings (Guo et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(FIELDS * ROWS, WIDTH), nn.Embedding(FIELDS * ROWS, 1)
        self.register_buffer("offsets", torch.arange(FIELDS) * ROWS, persistent=False)
        self.deep, self.dense = _mlp(FIELDS * WIDTH + DENSE, 48, 24, 1), nn.Linear(DENSE, 1)

    def forward(self, dense, sparse):
        index = sparse + self.offsets
        v = self.table(index)
        second = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True)
        deep = self.deep(torch.cat([v.flatten(1), dense], 1))
        return self.first(index).sum(1) + self.dense(dense) + second + deep


class WideAndDeep(nn.Module):
    """A linear model beside an MLP (Cheng et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, WIDTH) for _ in range(FIELDS))
        self.wide = nn.Linear(DENSE + FIELDS * WIDTH, 1)
        self.deep = nn.Sequential(
            nn.Linear(DENSE + FIELDS * WIDTH, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
        )

    def forward(self, dense, sparse):
        x = torch.cat([dense, *(table(sparse[:, i]) for i, table in enumerate(self.tables))], 1)
        return self.wide(x) + self.deep(x)


class TwoTower(nn.Module):
    """User and item each through an MLP, normalized, multiplied (Yi et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(ROWS, 24), nn.Embedding(ROWS, 24)
        self.user_tower, self.item_tower = _mlp(24 + DENSE, 48, 24), _mlp(24, 48, 24)

    def forward(self, dense, sparse):
        user = F.normalize(self.user_tower(torch.cat([self.users(sparse[:, 0]), dense], 1)), dim=1)
        item = F.normalize(self.item_tower(self.items(sparse[:, 1])), dim=1)
        return (user * item).sum(1, keepdim=True)


class CrossNetwork(nn.Module):
    """DCN-v2: layers that multiply the input by a linear map of itself, beside an MLP (Wang et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        width = DENSE + FIELDS * WIDTH
        self.tables = nn.ModuleList(nn.EmbeddingBag(ROWS, WIDTH, mode="mean") for _ in range(FIELDS))
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.deep, self.last = _mlp(width, 48, 32), nn.Linear(width + 32, 1)

    def forward(self, dense, sparse):
        tables = (table(sparse[:, i : i + 1]) for i, table in enumerate(self.tables))
        x = first = torch.cat([dense, *tables], 1)
        for cross in self.crosses:
            x = first * cross(x) + x
        return self.last(torch.cat([x, self.deep(first)], 1))


class NeuralFiltering(nn.Module):
    """NCF: a product of embeddings beside an MLP on others (He et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, 16), nn.Embedding(ROWS, 16)
        self.user_mlp, self.item_mlp = nn.Embedding(ROWS, 24), nn.Embedding(ROWS, 24)
        self.mlp, self.last = _mlp(48, 48, 16), nn.Linear(32, 1)

    def forward(self, dense, sparse):
        user, item = sparse[:, 0], sparse[:, 1]
        deep = self.mlp(torch.cat([self.user_mlp(user), self.item_mlp(item)], -1))
        return self.last(torch.cat([self.user(user) * self.item(item), F.relu(deep)], -1))


class InterestNetwork(nn.Module):
    """DIN: items of the history weighted by an MLP on them and the candidate (Zhou et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, WIDTH)
        self.attention = nn.Sequential(nn.Linear(4 * WIDTH, 24), nn.PReLU(), nn.Linear(24, 1))
        self.mlp = nn.Sequential(nn.Linear(2 * WIDTH, 48), nn.PReLU(48), nn.Linear(48, 1))

    def forward(self, dense, sparse):
        history, item = self.items(sparse[:, :-1]), self.items(sparse[:, -1])
        one = item.unsqueeze(1).expand_as(history)
        weights = self.attention(torch.cat([history, one, history - one, history * one], -1))
        return self.mlp(torch.cat([(weights * history).sum(1), item], -1))


class SasRec(nn.Module):
    """A causal transformer over items, scored against the table of the items (Kang and McAuley 2018)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(ROWS + 1, width, padding_idx=0), nn.Embedding(12, width)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, width, 1)) for _ in range(2)
        )

    def forward(self, history):
        length = history.shape[1]
        x = self.items(history) * self.items.embedding_dim**0.5 + self.positions(torch.arange(length))
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.forwards, strict=True)):
            q = self.norms[2 * i](x)
            x = q + attention(q, x, x, attn_mask=mask, need_weights=False)[0]
            y = self.norms[2 * i + 1](x)
            x = y + mlp(y.transpose(1, 2)).transpose(1, 2)
        return self.norms[4](x)[:, -1] @ self.items.weight.T


def _table() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    return random.standard_normal((2, DENSE)).astype(np.float32), random.integers(0, ROWS, (2, FIELDS))


def _history() -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).integers(1, ROWS, (2, 10)),)


_MODELS = {
    "dlrm": (Dlrm, _table),
    "deepfm": (DeepFm, _table),
    "wide-and-deep": (WideAndDeep, _table),
    "two-tower": (TwoTower, _table),
    "dcn-v2": (CrossNetwork, _table),
    "ncf": (NeuralFiltering, _table),
    "din": (InterestNetwork, _table),
    "sasrec": (SasRec, _history),
}
RECOMMENDERS = {
    name: Architecture(name, "recommender", seeded(build), example)
    for name, (build, example) in _MODELS.items()
}
