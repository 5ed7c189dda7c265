"""Language models quantized from their files, one block in memory at a time: memory, time, perplexity.

    python benchmarks/large_lm.py [--layers 8] [--method nearest|GPTQ] [--blocks 8] [--tokens 2048]
    PENJING_DATA=/path/to/data python benchmarks/large_lm.py --stories

The first form writes a LLaMA shape with random weights, 2,048 wide and 5,632 hidden, in bfloat16, to shards
in a temporary folder (8 layers: 0.48 billion parameters) and quantizes the first `--blocks` blocks to 4 bits
in groups of 32; the others only pass. The process that does it reports how far its largest resident size
rises above that after all imports, beside what two blocks in float32 and the embeddings (the table and the
output layer) take. Seconds are of the processor; those for a billion parameters count the blocks that were
quantized.

The second form takes stories260K (LLaMA shape) as a transformers checkpoint, calibrates on 32 sequences of
its own making and judges on 32 others, before and after.
"""

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import penjing as pj
from language_models import data_file
from penjing.backends.torch.decoder.shards import INDEX, Part, write_shard
from penjing.core.files import write_json

FORMAT = "uint4 group 32"
METHODS = {
    "nearest": pj.QuantizeNearest(FORMAT, None),
    "GPTQ": pj.QuantizeGPTQ(FORMAT),
    "GPTQ, compensated": pj.QuantizeGPTQ(FORMAT, compensate=True),
    "AWQ": pj.QuantizeAWQ(FORMAT),
    "AutoRound": pj.QuantizeAutoRound(FORMAT),
}
LENGTH = 256
MIB = 2**20


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--method", choices=METHODS, default="nearest")
    parser.add_argument("--blocks", type=int, default=8, help="blocks that are quantized")
    parser.add_argument("--tokens", type=int, default=2048, help="to calibrate on, and half as many to judge")
    parser.add_argument("--stories", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.stories:
            stories(Path(folder))
        else:
            large(Path(folder), chosen)


def large(folder: Path, chosen: argparse.Namespace) -> None:
    """Write the large model, quantize it in a process of its own, and print a row."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=chosen.layers,
        intermediate_size=5632,
        vocab_size=32000,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    (folder / "model").mkdir()
    counts = write_model(folder / "model", config)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds, peak, packed, whole = pool.submit(
            quantized, folder, chosen.method, chosen.blocks, chosen.tokens
        ).result()
    bound = (2 * counts["block"] + counts["rest"]) * 4 / MIB
    done = counts["block"] * min(chosen.blocks, chosen.layers)
    total = counts["block"] * chosen.layers + counts["rest"]
    print(
        f"{total:,} parameters, {counts['block']:,} in each of {chosen.layers} blocks, "
        f"{counts['rest']:,} outside; {chosen.tokens:,} tokens to calibrate\n"
    )
    heads = (
        "method",
        "blocks",
        "s",
        "s for a billion",
        "peak MiB",
        "two blocks and the embeddings",
        "packed",
    )
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    cells = (
        chosen.method,
        str(done // counts["block"]),
        f"{seconds:.0f}",
        f"{seconds / done * 1e9:.0f}",
        f"{peak:.0f}",
        f"{bound:.0f}",
        f"{packed / MIB:.0f} of {whole / MIB:.0f} MiB",
    )
    print(f"| {' | '.join(cells)} |")


def write_model(folder: Path, config: LlamaConfig) -> dict[str, int]:
    """Write random weights, a shard for each block and one for the rest; return the parameters of either."""
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    generator, weights = torch.Generator().manual_seed(0), {}
    for number in range(config.num_hidden_layers + 1):
        prefix, file = f"model.layers.{number}.", f"model-{number:05d}.safetensors"
        inside = [n for n in state if n.startswith(prefix)] or [n for n in state if ".layers." not in n]
        shapes = {name: state[name].shape for name in inside}
        write_shard(
            folder / file,
            {
                name: Part(torch.bfloat16, tuple(shape), partial(_drawn, shape, generator))
                for name, shape in shapes.items()
            },
        )
        weights |= dict.fromkeys(inside, file)
    config.save_pretrained(folder)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weights})
    count = {name: tensor.numel() for name, tensor in state.items()}
    return {
        "block": sum(n for name, n in count.items() if name.startswith("model.layers.0.")),
        "rest": sum(n for name, n in count.items() if ".layers." not in name),
    }


def _drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(torch.bfloat16)


def quantized(folder: Path, method: str, blocks: int, tokens: int) -> tuple[float, float, int, int]:
    """Return processor seconds, MiB above the size after imports, and packed and whole bytes."""
    torch.set_num_threads(1)
    warm_up()
    rng = np.random.default_rng(0)
    calibration = rng.integers(0, 32000, (tokens // LENGTH, LENGTH))
    judged = rng.integers(0, 32000, (tokens // LENGTH // 2, LENGTH))
    pattern = "|".join(f"model.layers.{number}.*" for number in range(blocks))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result = pj.quantize_checkpoint(
        folder / "model", pj.only(pattern, METHODS[method]), calibration, folder / "out", evaluation=judged
    )
    seconds = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return seconds, peak, result.packed_bytes, result.weight_bytes


def warm_up() -> None:
    """Import everything, by quantizing a tiny model."""
    tiny = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=32, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        write_model(Path(folder) / "model", tiny)
        ids = np.random.default_rng(0).integers(0, 32, (8, 16))
        pj.quantize_checkpoint(
            Path(folder) / "model", METHODS["GPTQ"], ids[:6], Path(folder) / "out", evaluation=ids[6:]
        )


def stories(folder: Path) -> None:
    """Print perplexities of stories260K by method and bits."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    write_stories(folder / "stories")
    with np.load(data_file("nlp/stories260K_selfsamples.npz")) as stored:
        tokens = stored["tokens"].astype(np.int64)
    print("| method | bits | before | after | ratio | 95% | packed | s |", "|---" * 8 + "|", sep="\n")
    for bits in (4, 3):
        for name, method in METHODS.items():
            small = method.model_copy(update={"weights": pj.number_format(f"uint{bits} group 32")})
            out = folder / f"{name}{bits}"
            found = pj.quantize_checkpoint(
                folder / "stories", small, tokens[:32, :-1], out, evaluation=tokens[32:]
            )
            p = found.perplexity
            assert p is not None
            share = found.packed_bytes / found.weight_bytes
            cells = (
                name,
                str(bits),
                f"{p.before:.3f}",
                f"{p.after:.3f}",
                f"{p.ratio:.3f}",
                f"{p.low:.3f} to {p.high:.3f}",
                f"{share:.0%}",
                f"{found.seconds:.0f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


def write_stories(folder: Path) -> None:
    """Write stories260K as transformers has it: rotary positions on halves in the place of neighbours."""
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=5,
        intermediate_size=172,
        vocab_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model, old = LlamaForCausalLM(config), load_file(data_file("weights/stories260K.safetensors"))
    new = {
        "model.embed_tokens.weight": old["tok_embeddings.weight"],
        "model.norm.weight": old["norm.weight"],
        "lm_head.weight": old["tok_embeddings.weight"],
    }
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = old[f"layers.{layer}.{theirs}.weight"]
            if theirs in ("attention.wq", "attention.wk"):
                weight = weight.view(-1, 4, 2, 64).transpose(1, 2).reshape(weight.shape)
            new[f"model.layers.{layer}.{ours}.weight"] = weight
    model.load_state_dict(new)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
