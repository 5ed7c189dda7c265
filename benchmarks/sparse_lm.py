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
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

import penjing as pj
from perplexity import MODELS, Change, Table

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


def by(method: pj.Method) -> Change:
    """Return how a method is applied."""

    def change(model: nn.Module, task: pj.Task) -> nn.Module:
        return pj.apply(model, method, task).model

    return change


def main() -> None:
    """Prune, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json")
    chosen = parser.parse_args()
    rows = {row: {name: by(made(**ROWS[row])) for name, made in METHODS.items()} for row in chosen.rows}
    Table(rows, "zeros", ("0", "dense")).show(chosen.models, chosen.json)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
