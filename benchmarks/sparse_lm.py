"""Perplexity of small language models with half of their weights zero, by several methods, without training.

    python benchmarks/sparse_lm.py [--models stories characters] [--rows 50% 2:4 70%] [--json FILE]

`stories`: the stories260K checkpoint (LLaMA shape), judged on sequences of its own making. `characters`: a
GPT of 0.8 million parameters, trained by this script on tinyshakespeare (once, cached), judged on the last
tenth of the text. Both need the folder PENJING_DATA. Calibration data are other sequences than those that
judge.

Intervals are 95%, from a bootstrap over sequences (tokens of one sequence hang together); `over dense` is the
paired ratio of perplexities on the same sequences. Below the table, the ratio of each method to the one
before it. Seconds are of one core.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import penjing as pj
from language_models import characters, stories
from penjing.arrays.bootstrap import Resampled, bootstrap

MODELS = {"stories": stories, "characters": characters}
METHODS: dict[str, Callable[..., pj.Method]] = {
    "magnitude": partial(pj.PruneMagnitude, scope="layer"),
    "Wanda": pj.PruneWanda,
    "SparseGPT": pj.PruneSparseGPT,
    "OBC": pj.PruneOBC,
    "ALPS": pj.PruneALPS,
    "ALPS, compensated": partial(pj.PruneALPS, compensate=True),
}
"""All give every layer the same share of zeros, as their papers do."""
ROWS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "70%": {"sparsity": 0.7},
}


@dataclass(frozen=True)
class Line:
    """One row of the table; intervals as (low, high)."""

    model: str
    zeros: str
    method: str
    perplexity: float
    interval: tuple[float, float]
    over_dense: float
    ratio_interval: tuple[float, float]
    seconds: float


def main() -> None:
    """Prune, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json")
    chosen = parser.parse_args()
    lines: list[Line] = []
    for name in chosen.models:
        steps: list[str] = []
        for line in judge(name, chosen.rows, steps):
            print(as_row(line), flush=True)
            lines.append(line)
        print("", *steps, sep="\n")
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump([asdict(line) for line in lines], file, indent=1)


def judge(name: str, rows: list[str], steps: list[str]) -> Iterator[Line]:
    """Yield the dense model's line, then those of every method at every row; note each method's step."""
    model, calibration, evaluation = MODELS[name]()
    task = task_of(calibration, evaluation)
    dense = losses(model, evaluation)
    print(f"\n{name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{calibration.size:,} tokens to calibrate, {dense.size:,} judged\n")  # fmt: skip
    print("| model | zeros | method | perplexity | 95% | over dense | 95% | s |", "|---" * 8 + "|", sep="\n")
    yield Line(name, "0", "dense", *numbers(dense), 1.0, (1.0, 1.0), 0.0)
    for row in rows:
        before: tuple[str, np.ndarray] | None = None
        for method, made in METHODS.items():
            start = time.process_time()
            small = pj.apply(model, made(**ROWS[row]), task).model
            seconds = time.process_time() - start
            found = losses(small, evaluation)
            yield Line(name, row, method, *numbers(found), *numbers(found - dense), seconds)
            if before is not None:
                steps.append(f"{row} {method} / {before[0]}: {step(found - before[1])}")
            before = method, found


def step(nats: np.ndarray) -> str:
    """Return the ratio of two perplexities in words."""
    ratio, (low, high) = numbers(nats)
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})" + (", not told apart" if low <= 1 <= high else "")


def task_of(calibration: np.ndarray, evaluation: np.ndarray) -> pj.Task:
    """Return next-token prediction as a task; the search never sees what judges, so valid is calibration."""
    (x, y), (test_x, test_y) = ((part[:, :-1], part[:, 1:]) for part in (calibration, evaluation))
    return pj.Task(
        train=(x, y), valid=(x[:8], y[:8]), test=(test_x, test_y),
        loss=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        metric=lambda logits, targets: 0.0, direction="minimize",
    )  # fmt: skip


def losses(model: nn.Module, sequences: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of every token but the first, in nats, [sequences, tokens - 1]."""
    parts = []
    with torch.no_grad():
        for ids in torch.from_numpy(sequences).split(32):
            logits = model(ids[:, :-1]).transpose(1, 2)
            parts.append(F.cross_entropy(logits, ids[:, 1:], reduction="none").numpy())
    return np.concatenate(parts).astype(float)


def numbers(nats: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return exp of the mean, and its 95% interval over sequences."""
    means = nats.mean(1)
    if np.ptp(means) == 0:
        return float(np.exp(means[0])), (float(np.exp(means[0])),) * 2
    found: Resampled = bootstrap(lambda weights: weights @ means / weights.sum(1), len(means))
    low, high = (float(np.exp(found.quantile(share))) for share in (0.025, 0.975))
    return float(np.exp(found.value)), (low, high)


def as_row(line: Line) -> str:
    """Return a line of the table in Markdown."""
    (low, high), (least, most) = line.interval, line.ratio_interval
    return (
        f"| {line.model} | {line.zeros} | {line.method} | {line.perplexity:.3f} | {low:.3f} to {high:.3f} "
        f"| {line.over_dense:.3f} | {least:.3f} to {most:.3f} | {line.seconds:.0f} |"
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
