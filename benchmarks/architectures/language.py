"""Language models, hand-written after their papers."""

import torch
from torch import nn
from torch.nn import functional as F

from architectures.registry import VOCABULARY, architectures, tokens

__all__ = ["LANGUAGE"]


class CausalAttention(nn.Module):
    """nanoGPT's attention: one projection, split in three."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (
            t.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for t in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class GptBlock(nn.Module):
    """Attention and MLP behind LayerNorms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            CausalAttention(width, heads),
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Gpt(nn.Module):
    """GPT-2's shape by hand (Radford et al. 2019), the output tied to the embedding."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(GptBlock(width, 4), GptBlock(width, 4))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        return self.lm_head(self.ln_f(self.blocks(x)))


class RmsNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions by complex pairs, and a gated MLP, as in llama2.c."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        kv = kv_heads * self.head_width
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = nn.Linear(width, kv, bias=False), nn.Linear(width, kv, bias=False)
        self.w1, self.w3 = nn.Linear(width, 96, bias=False), nn.Linear(width, 96, bias=False)
        self.w2 = nn.Linear(96, width, bias=False)
        self.attention_norm, self.ffn_norm = RmsNorm(width), RmsNorm(width)

    @staticmethod
    def _rotate(x, cos, sin):
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
        return turned.flatten(3)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        y = self.attention_norm(x)
        q = self._rotate(self.wq(y).view(batch, length, self.heads, self.head_width), cos, sin)
        k = self._rotate(self.wk(y).view(batch, length, self.kv_heads, self.head_width), cos, sin)
        v = self.wv(y).view(batch, length, self.kv_heads, self.head_width)
        repeats = self.heads // self.kv_heads
        k, v = (
            t[:, :, :, None, :].expand(-1, -1, -1, repeats, -1).reshape(batch, length, self.heads, -1)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(batch, length, -1))
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Llama(nn.Module):
    """The shape of the stories260K checkpoint (8 heads, 4 of keys and values), by hand."""

    def __init__(self, width: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(LlamaBlock(width, heads, heads // 2) for _ in range(2))
        self.norm, self.output = RmsNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.output.weight = self.tok_embeddings.weight
        each = width // heads
        angles = torch.outer(torch.arange(16), 10000.0 ** (-torch.arange(0, each, 2) / each))
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, idx):
        x, length = self.tok_embeddings(idx), idx.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.output(self.norm(x))


class MixtureOfExperts(nn.Module):
    """A dense mixture: every expert runs, a softmax weighs them (Jacobs et al. 1991)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.router = nn.Embedding(VOCABULARY, width), nn.Linear(width, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, width)) for _ in range(3)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, idx):
        x = self.words(idx)
        weights = self.router(x).softmax(-1)
        y = torch.stack([expert(x) for expert in self.experts], -1)
        return self.head(x + (y * weights.unsqueeze(-2)).sum(-1))


class StateSpace(nn.Module):
    """Mamba's block without its scan: gate, causal depthwise convolution, an exponential average."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(VOCABULARY, width), RmsNorm(width)
        self.inputs, self.outputs = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, groups=2 * width, padding=3)
        self.decay = nn.Parameter(torch.rand(2 * width))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, idx):
        x = self.words(idx)
        y, gate = self.inputs(self.norm(x)).chunk(2, dim=-1)
        y = F.silu(self.conv(y.transpose(1, 2))[..., : idx.shape[1]]).transpose(1, 2)
        y = y.cumsum(1) * torch.sigmoid(self.decay)
        return self.head(x + self.outputs(y * F.silu(gate)))


_HAND = {
    "gpt": Gpt,
    "llama-stories": Llama,
    "mixture-of-experts": MixtureOfExperts,
    "state-space": StateSpace,
}

LANGUAGE = architectures("language", _HAND, tokens())
