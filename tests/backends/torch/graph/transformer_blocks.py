"""Transformer blocks written by hand, in the ways that people write them, for tests of the graph."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def rotated(x):
    """Rotary positions on the last axis of [batch, heads, length, width], as most language models do it."""
    half = x.shape[-1] // 2
    places, rates = (torch.arange(n, device=x.device) for n in (x.shape[-2], half))
    angle = places[:, None] / 10 ** (rates / half)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Separate(nn.Module):
    """Three projections; fewer keys than queries where `keys` says so; optionally rotary positions."""

    def __init__(self, wide, heads, width, keys=None, rotary=False, norm=False):
        super().__init__()
        self.width, self.keys, self.heads, self.rotary = width, keys or heads, heads, rotary
        self.q, self.k, self.v = (nn.Linear(wide, n * width) for n in (heads, self.keys, self.keys))
        self.o = nn.Linear(heads * width, wide)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = self.norm(q), self.norm(k)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if self.keys < self.heads:
            times = self.heads // self.keys
            k, v = (
                y[:, :, None].expand(y.shape[0], self.keys, times, *y.shape[2:]).flatten(1, 2) for y in (k, v)
            )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """One projection, taken apart by view, permute and unbind; products and softmax written out."""

    def __init__(self, wide, heads, width):
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.proj = nn.Linear(wide, 3 * heads * width), nn.Linear(heads * width, wide)
        self.bias = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x):
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        a = (q @ k.transpose(-2, -1) / math.sqrt(self.width) + self.bias).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(n, length, self.heads * self.width))


class Chunked(nn.Module):
    """One projection in three chunks, heads merged with the batch for bmm; einsum for the second product."""

    def __init__(self, wide, heads, width):
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.proj = nn.Linear(wide, 3 * heads * width, bias=False), nn.Linear(heads * width, wide)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = (
            y.view(n, length, self.heads, self.width).transpose(1, 2).reshape(-1, length, self.width)
            for y in self.qkv(x).chunk(3, -1)
        )
        a = torch.bmm(q, k.transpose(1, 2)).mul(self.width**-0.5).softmax(-1)
        y = torch.einsum("bts,bsd->btd", a, v).view(n, self.heads, length, self.width)
        return self.proj(y.transpose(1, 2).reshape(n, length, -1))


class RootMeanSquare(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, wide):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(wide))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    """Two projections, one the gate of the other."""

    def __init__(self, wide, hidden):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(wide, hidden),
            nn.Linear(wide, hidden),
            nn.Linear(hidden, wide),
        )

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class HalfGated(nn.Module):
    """One projection of which one half is the gate of the other."""

    def __init__(self, wide, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(wide, 2 * hidden), nn.Linear(hidden, wide)

    def forward(self, x):
        return self.down(F.glu(self.up(x)))


class Plain(nn.Module):
    """Two layers."""

    def __init__(self, wide, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(wide, hidden), nn.Linear(hidden, wide)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


ATTENTIONS = {
    "separate": lambda wide: Separate(wide, 4, 6),
    "grouped": lambda wide: Separate(wide, 4, 4, keys=2),
    "one key": lambda wide: Separate(wide, 3, 4, keys=1),
    "rotary": lambda wide: Separate(wide, 4, 4, keys=2, rotary=True),
    "normalized": lambda wide: Separate(wide, 4, 4, norm=True),
    "fused": lambda wide: Fused(wide, 4, 5),
    "chunked": lambda wide: Chunked(wide, 4, 5),
}
FEEDS = {"plain": Plain, "gated": Gated, "half gated": HalfGated}
NORMS = {
    "layer": nn.LayerNorm,
    "root": RootMeanSquare,
    "torch root": nn.RMSNorm,
    "none": lambda wide: nn.Identity(),
}


class Transformer(nn.Module):
    """Embeddings, blocks with a residual stream, and the embedding as the last layer too."""

    def __init__(self, blocks, norm="layer", wide=16, vocabulary=11, tied=True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, wide), nn.Parameter(torch.zeros(1, 5, wide))
        self.attentions = nn.ModuleList([ATTENTIONS[name](wide) for name, _ in blocks])
        self.feeds = nn.ModuleList([FEEDS[name](wide, 20) for _, name in blocks])
        self.norms = nn.ModuleList([NORMS[norm](wide) for _ in range(2 * len(blocks) + 1)])
        self.head = nn.Linear(wide, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions
        for i, (attention, feed) in enumerate(zip(self.attentions, self.feeds, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))
