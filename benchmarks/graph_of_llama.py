"""The groups of a LLaMA shape of a billion parameters, on the meta device: seconds and peak memory.

python benchmarks/graph_of_llama.py [--layers 16] [--length 16]
"""

import argparse
import resource
import time

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from penjing.backends.torch import BACKEND


class Logits(nn.Module):
    """A causal language model as token numbers to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits `[batch, length, vocabulary]`."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def llama(layers: int) -> nn.Module:
    """Return the shape without weights: 2048 wide, 32 heads on 8 keys, 5632 in the gated layers."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=layers,
        intermediate_size=5632,
        vocab_size=32000,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return Logits(LlamaForCausalLM(config).eval())


def peak_mib() -> float:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--length", type=int, default=16, help="tokens of the example")
    options = parser.parse_args()
    model = llama(options.layers)
    parameters, before = sum(p.numel() for p in model.parameters()), peak_mib()
    start, spent = time.perf_counter(), time.process_time()
    groups = BACKEND.groups(model, (np.zeros((1, options.length), np.int64),))
    seconds, processor = time.perf_counter() - start, time.process_time() - spent
    print(f"{parameters:,} parameters, {options.layers} layers, weights on the meta device")
    print(f"{seconds:.1f} s ({processor:.1f} s of processor time)")
    print(f"peak memory {peak_mib():.0f} MiB, of which {peak_mib() - before:.0f} MiB for the graph")
    for kind in dict.fromkeys(group.kind for group in groups.groups):
        mine = [group for group in groups.groups if group.kind == kind]
        print(f"{len(mine)} groups of kind {kind}, {sum(group.size for group in mine):,} units")
    for layer, reason in groups.frozen.items():
        print(f"frozen: {layer}: {reason}")


if __name__ == "__main__":
    main()
