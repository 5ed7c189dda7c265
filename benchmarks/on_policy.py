"""A small decoder trained towards a larger one: on the data's texts, and on texts that it continues itself.

    python benchmarks/on_policy.py [--seeds 3] [--steps 200]

Texts are rows of 16 tokens from a rule with a memory: two counters that take turns, each going up or down
until it turns at random. A decoder of width 48 is trained on 512 rows and teaches one of width 16, the same
number of steps in every row: by the text of the data with labels, towards the teacher on the data
(`on_policy=0`), and with half or all of the batches continued by the student. Students start from the same
weights for a seed, after a quarter of the steps towards the teacher on the data.

Prints the mean, with the lowest and highest of the seeds, of the share of the student's own tokens that break
the rule, of the reverse divergence KL(student || teacher) on its own texts, and of the loss on unseen texts
of the data; CPU seconds.
"""

import argparse
import time

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.backends.torch.distill.continuation import Sampling, continue_texts
from penjing.backends.torch.distill.distillation import generalized_divergence
from penjing.core.context import Context

TOKENS, LENGTH, PROMPT = 12, 16, 4
HOW = {"optimizer": "adamw", "lr": 0.005, "batch_size": 32, "weight_decay": 0.0}


class Decoder(nn.Module):
    """Two causal layers: tokens [n, t] to logits [n, t, 12]."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.places = nn.Embedding(TOKENS, width), nn.Parameter(torch.randn(LENGTH, width) / 4)
        self.body = nn.ModuleList(Layer(width) for _ in range(2))
        self.out = nn.Linear(width, TOKENS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits of the next token at every position."""
        x = self.table(ids) + self.places[: ids.shape[1]]
        for layer in self.body:
            x = layer(x)
        return self.out(x)


class Layer(nn.Module):
    """Causal attention of four heads and a feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.given, self.taken = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return states [n, t, width]."""
        parts = self.given(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.taken(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def texts(count: int, seed: int) -> np.ndarray:
    """Return rows of tokens: at even places one counter, at odd places another, steps of +1 or -1."""
    generator = np.random.default_rng(seed)
    turns = np.where(generator.random((count, 2, LENGTH // 2 + 1)) < 0.1, -1, 1)
    ways = np.cumprod(turns, axis=2) * generator.choice([-1, 1], (count, 2, 1))
    counters = (generator.integers(0, TOKENS, (count, 2, 1)) + np.cumsum(ways, axis=2)) % TOKENS
    return counters.transpose(0, 2, 1).reshape(count, -1)[:, : LENGTH + 1]


def broken(ids: np.ndarray) -> float:
    """Return the share of continued tokens that are no step from the one two places before."""
    steps = (ids[:, PROMPT:] - ids[:, PROMPT - 2 : -2]) % TOKENS
    return float(1 - np.isin(steps, (1, TOKENS - 1)).mean())


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the next tokens."""
    return cross_entropy(outputs.flatten(0, 1), targets.flatten())


def right(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return how many next tokens are the likeliest."""
    return float((outputs.argmax(-1) == targets).mean())


def judged(student: nn.Module, teacher: nn.Module, own: pj.Task) -> tuple[float, float, float]:
    """Return broken tokens in percent and the divergence on a student's own texts, and the loss on others."""
    ids, targets = (torch.from_numpy(x) for x in (own.test.inputs[0], own.test.targets))
    torch.manual_seed(0)
    made = continue_texts(student, ids, Sampling(1.0, PROMPT))
    with torch.no_grad():
        mine, its = (m.eval()(made)[:, PROMPT - 1 : -1].flatten(0, 1) for m in (student, teacher))
        return (
            100 * broken(made.numpy()),
            float(generalized_divergence(mine, its, 1.0)),
            float(loss(student(ids), targets)),
        )


def main() -> None:
    """Train the teacher and all students, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: texts(512, seed) for seed, name in enumerate(("train", "valid", "test"))}
    splits = {name: pj.Split((ids[:, :-1],), ids[:, 1:], name) for name, ids in rows.items()}
    own = pj.Task(**splits, loss=loss, metric=right, direction="maximize", max_overlap=1).prepare()
    epochs = options.steps * HOW["batch_size"] / 512

    def trained(model: nn.Module, method: pj.Method) -> nn.Module:
        return pj.apply(model, method, own, context=Context(task=own, backend=BACKEND, original=model)).model

    teacher = trained(Decoder(48, 0), pj.FineTune(epochs=2 * epochs, **HOW))

    def towards(share: float, beta: float, length: float = epochs) -> pj.Method:
        return pj.DistillOnPolicy(on_policy=share, beta=beta, prompt=PROMPT, epochs=length, **HOW)

    print("| trained | tokens that break the rule, % | KL(student, teacher) | loss on texts | CPU s |")
    print("|---|---|---|---|---|")
    print("| teacher | {:.1f} | {:.3f} | {:.3f} | |".format(*judged(teacher, teacher, own)))
    seeds = range(1, 1 + options.seeds)
    starts = [
        pj.distill(Decoder(16, s), teacher, own, towards(0, 0, epochs / 4), seed=s).model for s in seeds
    ]
    methods = {"on the data, by labels": pj.FineTune(epochs=epochs, **HOW)}
    for share, beta in ((0, 0), (0, 1), (0.5, 0.5), (1, 0), (1, 1)):
        methods[f"`on_policy={share:g}`, `beta={beta:g}`"] = towards(share, beta)
    for name, method in methods.items():
        began = time.process_time()
        if isinstance(method, pj.FineTune):
            found = [trained(start, method) for start in starts]
        else:
            pairs = zip(starts, seeds, strict=True)
            found = [pj.distill(start, teacher, own, method, seed=s).model for start, s in pairs]
        busy = (time.process_time() - began) / len(starts)
        columns = np.array([judged(model, teacher, own) for model in found]).T
        words = [
            f"{c.mean():.{d}f} ({c.min():.{d}f} to {c.max():.{d}f})"
            for c, d in zip(columns, (1, 3, 3), strict=True)
        ]
        print(f"| {name} | {' | '.join(words)} | {busy:.1f} |", flush=True)


if __name__ == "__main__":
    main()
