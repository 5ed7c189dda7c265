"""Vision transformers, hand-written after their papers."""

import torch
from torch import nn
from torch.nn import functional as F

from architectures.registry import CLASSES, architectures, images

__all__ = ["VISION_TRANSFORMERS"]


class Attention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values, as in timm's ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, attention: nn.Module, scale: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1 = nn.Parameter(torch.full((width,), 0.5)) if scale else 1.0
        self.scale2 = nn.Parameter(torch.full((width,), 0.5)) if scale else 1.0

    def forward(self, x):
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Vit(nn.Module):
    """ViT (Dosovitskiy et al. 2021); with a second token and head, DeiT (Touvron et al. 2021)."""

    def __init__(
        self, attention=Attention, distilled: bool = False, scale: bool = False, width: int = 48
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.tokens = nn.Parameter(torch.randn(1, 1 + distilled, width))
        self.positions = nn.Parameter(torch.randn(1, 17 + distilled, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, attention(width, 4), scale) for _ in range(2)))
        self.norm, self.heads = (
            nn.LayerNorm(width),
            nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(1 + distilled)),
        )

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.norm(self.blocks(x))
        return sum(head(x[:, i]) for i, head in enumerate(self.heads)) / len(self.heads)


class PlainAttention(nn.Module):
    """Attention by two matrix products and a softmax, with three projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def _split(self, x):
        return x.view(x.shape[0], -1, self.heads, self.head_width).transpose(1, 2)

    def forward(self, x):
        q, k, v = self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        weights = (q @ k.transpose(-2, -1) * self.head_width**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Attention without a softmax: features of keys times values first (Katharopoulos et al. 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2).unsqueeze(-1))
        return self.proj(y.transpose(1, 2).flatten(2))


class WindowAttention(nn.Module):
    """Attention inside 4x4 windows with a learned bias for relative positions, shifted by a roll."""

    def __init__(self, width: int, heads: int, shift: int, side: int = 4) -> None:
        super().__init__()
        self.heads, self.shift, self.side = heads, shift, side
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads) * 0.1)
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + side - 1
        self.register_buffer("index", apart[0] * (2 * side - 1) + apart[1])

    def forward(self, x):
        batch, rows, columns, width = x.shape
        side = self.side
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, rows // side, side, columns // side, side, width)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, width)
        qkv = self.qkv(x).reshape(x.shape[0], side * side, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.index.view(-1)].view(side * side, side * side, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias.unsqueeze(0))
        y = self.proj(y.transpose(1, 2).reshape(x.shape))
        y = y.view(batch, rows // side, columns // side, side, side, width).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, rows, columns, width)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


class PatchMerging(nn.Module):
    """Four neighbouring patches become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    """Two stages of shifted windows (Liu et al. 2021)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(2 * width)
        self.stages = nn.Sequential(
            *(Block(width, WindowAttention(width, 2, s)) for s in (0, 2)),
            PatchMerging(width),
            *(Block(2 * width, WindowAttention(2 * width, 4, s)) for s in (0, 2)),
        )
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x):
        x = self.stages(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class LibraryEncoder(nn.Module):
    """torch's own TransformerEncoder on patches."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        layer = nn.TransformerEncoderLayer(width, 4, 96, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


_HAND = {
    "vit-fused-qkv": Vit,
    "vit-separate-qkv": lambda: Vit(PlainAttention),
    "deit": lambda: Vit(distilled=True),
    "cait-scale": lambda: Vit(scale=True),
    "vit-linear-attention": lambda: Vit(LinearAttention),
    "swin": Swin,
    "torch-transformer-encoder": LibraryEncoder,
}

VISION_TRANSFORMERS = architectures("vision transformer", _HAND, images())
