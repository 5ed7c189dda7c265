"""What a low-rank correction of rounded weights is worth, beside spending its bytes on bits: a trial.

    PENJING_DATA=/path/to/data python benchmarks/low_rank.py [--models characters stories]

The residual of a rounded weight, W - Q, is replaced by its best matrix of rank r in the outputs: the singular
vectors of (W - Q) S, S being the square root of the damped second moments of the inputs (Zhang et al. 2024,
"LQER"; with the root in the place of a diagonal Zhang et al. 2024, "QERA"). Both factors are rounded to 8
bits, a scale for each rank. Inputs are those of the float model. Bits of a weight count scales of 16 bits and
zero points of the weight's bits, and both factors. Perplexity over float, on judged sequences.
"""

import argparse

import numpy as np
import torch

import penjing as pj
from one_shot_sparsity import BACKEND
from penjing.arrays.formats.coding import rounded
from penjing.arrays.sparsity.gram import damped
from penjing.backends.torch.quantizers import quantized_layers
from penjing.calibration.inputs import calibration_batches, input_grams
from penjing.core.context import Context
from penjing.core.number_format import number_format
from perplexity import MODELS, losses, numbers, task_of

RANKS = (0, 1, 2, 4, 8)
FACTOR = number_format("int8 narrow channel")
METHODS = {"nearest": pj.QuantizeNearest, "GPTQ": pj.QuantizeGPTQ}


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["characters"])
    torch.set_num_threads(1)
    for name in parser.parse_args().models:
        model, calibration, judged = MODELS[name]()
        task, whole = task_of(calibration, judged).prepare(), losses(model, judged)
        moments = _moments(model, task)
        print(f"\n| {name} | rank | bits of a weight | over float | 95% |", "|---" * 5 + "|", sep="\n")
        for bits in (3, 4):
            for method, kind in METHODS.items():
                for group in (32, 128):
                    plan = pj.only("!output", kind(f"uint{bits} group {group}", None, ends=False))
                    small = pj.apply(model, plan, task).model
                    weights = {
                        n: layer.weight_quantizer(layer.weight).detach()
                        for n, layer in quantized_layers(small)
                    }
                    for rank in RANKS if group == 32 or method == "nearest" else RANKS[:1]:
                        fixed = BACKEND.copy(model)
                        size = corrected(fixed, model, weights, moments, rank, bits, group)
                        ratio, (low, high) = numbers(losses(fixed, judged) - whole)
                        cells = (
                            f"{bits} bits, groups of {group}, {method}",
                            str(rank),
                            f"{size:.2f}",
                            f"{ratio:.4f}",
                            f"{low:.4f} to {high:.4f}",
                        )
                        print(f"| {' | '.join(cells)} |", flush=True)


def _moments(model: torch.nn.Module, task: pj.Task) -> dict[str, np.ndarray]:
    """Return the mean of x xᵀ by layer, for linear layers."""
    context = Context(task=task, backend=BACKEND, original=model)
    layers = [layer for layer in BACKEND.layers(model) if layer.kind == "linear" and layer.name != "output"]
    batches = calibration_batches(context, 256, 32)
    return {name: gram.mean[0] for name, gram in input_grams(BACKEND, model, layers, batches, 0).items()}


def corrected(
    fixed: torch.nn.Module,
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    moments: dict[str, np.ndarray],
    rank: int,
    bits: int,
    group: int,
) -> float:
    """Put rounded weights with their correction into a float copy; return the mean bits of a weight."""
    stored = count = 0.0
    for name, rounded_weight in weights.items():
        float_weight = model.get_submodule(name).weight.detach().double().numpy()
        new = rounded_weight.double().numpy()
        rows, columns = new.shape
        values, vectors = np.linalg.eigh(damped(moments[name]))
        root = np.sqrt(values)
        left, sizes, right = np.linalg.svd((float_weight - new) @ (vectors * root), full_matrices=False)
        a = left[:, :rank] * np.sqrt(sizes[:rank])
        b = np.sqrt(sizes[:rank])[:, None] * right[:rank] / root @ vectors.T
        if rank:
            a, b = rounded(np.float32(a.T), FACTOR).T, rounded(np.float32(b), FACTOR)
            new = new + a.astype(np.float64) @ b
        stored += rows * columns * bits + rows * -(-columns // group) * (16 + bits)
        stored += rank * (8 * (rows + columns) + 32)
        count += rows * columns
        with torch.no_grad():
            fixed.get_submodule(name).weight.copy_(torch.from_numpy(new))
    return stored / count


if __name__ == "__main__":
    main()
