"""Perplexity of small language models with weights of 8 to 2 bits, by several methods, without training.

    python benchmarks/quantized_lm.py [--models stories characters] [--bits 8 4 3 2] [--methods ...]
        [--json FILE]

Models, data and intervals are those of `perplexity.py`, as in `sparse_lm.py`: `stories` is the stories260K
checkpoint (LLaMA shape), judged on sequences of its own making; `characters` a GPT of 0.8 million parameters
on tinyshakespeare, judged on text that it has not seen. Both need the folder PENJING_DATA.

All linear layers but the output, which is tied to the embedding, get unsigned integers with a scale and a
zero point for each group of 32 inputs; rows of 172 inputs, in stories260K, end with 12. Inputs of layers stay
float. `over float` is the paired ratio of perplexities on the same sequences, with a 95% interval from a
bootstrap over sequences. Below the table, the ratio of each method to the one before it. Seconds are of one
core, and count the processor's time.

`nearest` has scales by clip search. HQQ is that of `half_quadratic.py`, with real zero points. `--block`
times each method on one random block of the LLaMA shape instead, 1,024 wide, and gives seconds for a billion
parameters and the memory beyond the model and its data.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from torch import nn

import half_quadratic
import penjing as pj
from language_models import LlamaLayer
from perplexity import MODELS, Table

COMMON: dict[str, Any] = {"ends": False, "skip": ("output",)}
Quantize = Callable[[str, nn.Module, pj.Task], nn.Module]


def by(method: type[pj.Method], **fields: Any) -> Quantize:
    """Return how a method is applied in a format of weights."""
    return lambda name, model, task: pj.apply(model, method(name, None, **COMMON, **fields), task).model


METHODS: dict[str, Quantize] = {
    "nearest": by(pj.QuantizeNearest),
    "HQQ": lambda name, model, task: half_quadratic.quantized(model, name, COMMON["skip"]),
    "AWQ": by(pj.QuantizeAWQ),
    "GPTQ": by(pj.QuantizeGPTQ),
    "GPTQ, compensated": by(pj.QuantizeGPTQ, compensate=True),
    "AutoRound": by(pj.QuantizeAutoRound),
}


def main() -> None:
    """Quantize, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json")
    parser.add_argument("--block", action="store_true")
    chosen = parser.parse_args()
    if chosen.block:
        time_block(chosen.methods)
        return
    rows = {
        str(bits): {name: partial(METHODS[name], f"uint{bits} group 32") for name in chosen.methods}
        for bits in chosen.bits
    }
    Table(rows, "bits", ("32", "float")).show(chosen.models, chosen.json)


def time_block(methods: list[str]) -> None:
    """Time methods on a random block, each in a process of its own, since a process only knows its peak."""
    print("| method | s | s for a billion parameters | peak MB |", "|---" * 4 + "|", sep="\n")
    for method in methods:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            seconds, count, peak = pool.submit(timed, method).result()
        print(f"| {method} | {seconds:.1f} | {seconds / count * 1e9:.0f} | {peak:.0f} |", flush=True)


def timed(method: str) -> tuple[float, int, float]:
    """Return processor seconds at 4 bits, parameters, and the growth of the peak memory in MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = LlamaLayer(1024, 2816, 16, 16).eval()
    x, y = torch.randn(32, 128, 1024).numpy(), np.zeros(32, np.int64)
    task = pj.Task(train=(x, y), valid=(x[:2] + 1, y[:2]), test=(x[:2] - 1, y[:2]))
    before, start = getrusage(RUSAGE_SELF).ru_maxrss, time.process_time()
    METHODS[method]("uint4 group 32", block, task)
    seconds = time.process_time() - start
    count = sum(p.numel() for p in block.parameters())
    return seconds, count, (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
