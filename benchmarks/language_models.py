"""Small language models with trained weights, for the benchmarks: stories260K and a character GPT."""

import gzip
import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import penjing as pj

CACHE = Path(os.environ.get("PENJING_CACHE", "~/.cache/penjing")).expanduser()
CONTEXT = 128
"""Characters that the GPT sees at once."""
STEPS, BATCH, RATE = 1000, 24, 2e-3
HELD_OUT = 0.1
"""Share of the text, at its end, that the GPT is not trained on."""


def data_file(name: str) -> Path:
    """Return the path of a file in the data folder; refuse where it is not there."""
    folder = os.environ.get("PENJING_DATA", "")
    if not folder or not (Path(folder) / name).is_file():
        raise pj.Refused(
            "the data are there",
            value=folder or "PENJING_DATA is not set",
            place=name,
            fix=f"set PENJING_DATA to the folder with {name}",
        )
    return Path(folder) / name


class Norm(nn.Module):
    """Division by the root mean square (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same shape."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions on neighbouring pairs."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.each = width // heads
        self.wq, self.wo = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(width, kv_heads * self.each, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, tokens, width]."""
        n, tokens, width = x.shape
        q, k, v = (layer(x).view(n, tokens, -1, self.each) for layer in (self.wq, self.wk, self.wv))
        q, k, v = (part.transpose(1, 2) for part in (self._turned(q), self._turned(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(n, tokens, width))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        rates = 1e4 ** (-torch.arange(0, self.each, 2) / self.each)
        angles = torch.outer(torch.arange(x.shape[1]), rates)[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
        return torch.stack(turned, -1).flatten(-2)


class FeedForward(nn.Module):
    """A gated layer: w2(silu(w1 x) · w3 x) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, tokens, width]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaLayer(nn.Module):
    """Attention, then the gated layer, each on a normalized copy and added."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads, kv_heads), FeedForward(width, hidden)
        self.attention_norm, self.ffn_norm = Norm(width), Norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, tokens, width]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The LLaMA shape of the stories260K checkpoint (Karpathy's llama2.c); the output is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(512, 64)
        self.layers = nn.Sequential(*(LlamaLayer(64, 172, 8, 4) for _ in range(5)))
        self.norm, self.output = Norm(64), nn.Linear(64, 512, bias=False)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [n, tokens, 512]."""
        return self.output(self.norm(self.layers(self.tok_embeddings(ids))))


class GptLayer(nn.Module):
    """Attention, then a layer of four times the width, each on a normalized copy and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, tokens, width]."""
        n, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A GPT over characters (Radford et al. 2019); the output is the embedding."""

    def __init__(self, symbols: int, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(GptLayer(width, 4) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        for table in (self.symbols, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.output.weight = self.symbols.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [n, tokens, symbols]."""
        x = self.symbols(ids) + self.places(torch.arange(ids.shape[1]))
        return self.output(self.norm(self.layers(x)))


def stories() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """Return stories260K, and sequences of its own, [32, 200] to calibrate and to judge with."""
    model = Llama()
    weights = load_file(data_file("weights/stories260K.safetensors"))
    model.load_state_dict(weights | {"output.weight": weights["tok_embeddings.weight"]})
    with np.load(data_file("nlp/stories260K_selfsamples.npz")) as stored:
        tokens = stored["tokens"].astype(np.int64)
    return model.eval(), tokens[:32], tokens[32:]


def characters(steps: int = STEPS) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """Return a character GPT, and sequences of the text that it has and has not seen, [128 and n, 129].

    Trained here and cached: 0.8 million parameters on tinyshakespeare, some minutes on two cores.
    """
    text = gzip.decompress(data_file("nlp/tinyshakespeare.txt.gz").read_bytes()).decode()
    symbols = {symbol: index for index, symbol in enumerate(sorted(set(text)))}
    ids = np.array([symbols[symbol] for symbol in text], np.int64)
    cut = int(len(ids) * (1 - HELD_OUT))
    torch.manual_seed(0)
    model, path = Gpt(len(symbols)), CACHE / f"gpt_characters_{steps}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path) | {"output.weight": load_file(path)["symbols.weight"]})
    else:
        train(model, ids[:cut], steps)
        CACHE.mkdir(parents=True, exist_ok=True)
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
        save_file(state, path)
    starts = np.random.default_rng(0).integers(0, cut - CONTEXT - 1, 128)
    seen = np.stack([ids[start : start + CONTEXT + 1] for start in starts])
    unseen = ids[cut:][: (len(ids) - cut) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    return model.eval(), seen, unseen


def train(model: nn.Module, ids: np.ndarray, steps: int) -> None:
    """Train on windows of a text, in bfloat16 where the processor gains from it."""
    rng, text = np.random.default_rng(0), torch.from_numpy(ids)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.1)
    model.train()
    for step in range(steps):
        rate = RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = rng.integers(0, len(ids) - CONTEXT - 1, BATCH)
        windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
