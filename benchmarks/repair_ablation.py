"""What repair alone brings back after a cut: a CIFAR ResNet, no training, every repair after the same cuts.

    PENJING_DATA=/path/to/data python benchmarks/repair_ablation.py [--depth 20] [--examples 2500]

Prints a table in Markdown: accuracy on validation images, the divergence of the predictions from those of the
original (nats; finer than accuracy) and the processor seconds of the repair on one thread.
"""

import argparse
import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import torch

import penjing as pj
from penjing.core.backend import backend_for
from penjing.core.context import Context

CUTS = {
    "25% of channels": pj.PruneChannels(0.25),
    "50% of channels": pj.PruneChannels(0.5),
    "80% zeros": pj.PruneMagnitude(sparsity=0.8),
    "90% zeros": pj.PruneMagnitude(sparsity=0.9),
}
BATCHNORM, LEAST, MATCH = pj.ReestimateBatchNorm(), pj.LeastSquares(), pj.MatchStatistics()
REPAIRS = {
    "none": (),
    "bias": (pj.MatchStatistics(variance=False),),
    "BatchNorm": (BATCHNORM,),
    "statistics": (MATCH,),
    "least squares": (LEAST,),
    "least squares, BatchNorm": (LEAST, BATCHNORM),
    "least squares, statistics": (LEAST, MATCH),
    "statistics, least squares": (MATCH, LEAST),
    "least squares twice": (LEAST, LEAST),
}


def example(depth: int):
    """Return the module of the CIFAR example, for a network of this depth."""
    os.environ["CIFAR_RESNET"] = str(depth)
    path = Path(__file__).parents[1] / "examples" / "cifar10.py"
    spec = importlib.util.spec_from_file_location("cifar10", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(model: torch.nn.Module, x: np.ndarray) -> torch.Tensor:
    """Return the outputs for images, in evaluation mode."""
    backend = backend_for(model)
    return torch.cat([torch.from_numpy(backend.run(model, (x[i : i + 500],))) for i in range(0, len(x), 500)])


def divergence(found: torch.Tensor, original: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of the predictions from the original's, in nats."""
    return float(
        torch.nn.functional.kl_div(
            found.log_softmax(1), original.log_softmax(1), log_target=True, reduction="batchmean"
        )
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--examples", type=int, default=2500, help="validation images")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=list(REPAIRS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cifar = example(options.depth)
    model, task = cifar.model(), cifar.task().prepare()
    inputs, targets = task.valid.arrays()
    x, y = inputs[0][: options.examples], targets[: options.examples]
    original = logits(model, x)
    context = Context(task=task, backend=backend_for(model), original=model)
    print(f"ResNet-{options.depth}, dense: {100 * np.mean(original.argmax(1).numpy() == y):.2f}%\n")
    print("cut | repair | accuracy, % | divergence | seconds\n---|---|---|---|---")
    for cut in options.cuts:
        damaged = pj.apply(model, CUTS[cut], task, context=context).model
        for repair in options.repairs:
            start = time.process_time()
            repaired = pj.apply(damaged, REPAIRS[repair], task, context=context).model
            seconds = time.process_time() - start
            found = logits(repaired, x)
            accuracy = 100 * np.mean(found.argmax(1).numpy() == y)
            print(
                f"{cut} | {repair} | {accuracy:.2f} | {divergence(found, original):.3f} | {seconds:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
