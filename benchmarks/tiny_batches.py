"""Batches too small for BatchNorm: BatchNorm, with smaller ghost batches, frozen, and GroupNorm in its place.

    PENJING_DATA=/path/to/data python benchmarks/tiny_batches.py [--sizes 1 2 4 32] [--examples 4000]

A network of four convolutions, trained from drawn weights on some images of Fashion-MNIST for two passes, the
learning rate in proportion to the batch (Goyal et al. 2017). Rows of a size share order and weights. Prints
the accuracy on 5,000 unseen images, the mean of the seeds with the lowest and the highest, and seconds; then
the latency in ONNX Runtime, where BatchNorm is folded and GroupNorm is not.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import penjing as pj
from penjing.measurement.side_by_side import ratios

WIDTHS = (16, 32, 32, 64)
RATE = 0.02
"""Of batches of 32."""


def network(seed: int) -> nn.Module:
    """Return the network with weights drawn by the seed."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after, stride in zip((1, *WIDTHS), WIDTHS, (2, 1, 2, 1), strict=False):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def task_of(examples: int) -> pj.Task:
    """Return the task with so many training images."""
    folder = os.environ.get("PENJING_DATA")
    if not folder:
        sys.exit("set PENJING_DATA to the folder with cv/fashion_mnist.npz")
    with np.load(Path(folder) / "cv" / "fashion_mnist.npz") as data:
        images = {name: data[f"{name}_images"] for name in ("train", "test")}
        labels = {name: data[f"{name}_labels"].astype(np.int64) for name in ("train", "test")}
    x = {name: ((part[:, None] / 255 - 0.286) / 0.353).astype(np.float32) for name, part in images.items()}
    return pj.Task(
        train=(x["train"][:examples], labels["train"][:examples]),
        valid=(x["test"][:5000], labels["test"][:5000]),
        test=(x["test"][5000:], labels["test"][5000:]),
    ).prepare()


ROWS = {
    "BatchNorm": ((), {}),
    "BatchNorm, frozen": ((), {"batchnorm": "frozen"}),
    "GroupNorm, 8 groups": ((pj.ReplaceBatchNorm(groups=8),), {}),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 32])
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(options.examples)
    print("| batch | row | accuracy % (lowest to highest) | seconds |\n|---|---|---|---|")
    for size in options.sizes:
        for name, (before, more) in ROWS.items():
            found, seconds = [], []
            for seed in range(options.seeds):
                model = network(seed)
                if before:
                    model = pj.apply(model, before, task).model
                lr = RATE * size / 32
                strategy = pj.Strategy(epochs=2, batch_size=size, lr=lr, schedule="one_cycle", **more)
                fitted = pj.fit(model, task, strategy, seed=seed, say=lambda line: None)
                found.append(100 * fitted.record.quality)
                seconds.append(fitted.record.seconds)
            words = f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f}) | {np.mean(seconds):.1f}"
            print(f"| {size} | {name} | {words} |", flush=True)
    example = task.valid.example()
    target = pj.Target(threads=1)
    with tempfile.TemporaryDirectory(prefix="penjing-") as folder:
        folders = {}
        for name, (before, _) in ROWS.items():
            model = network(0).eval()
            if before:
                model = pj.apply(model, before, task).model
            folders[name] = pj.deliver(model, target, Path(folder) / str(len(folders)), example=example).path
        first = next(iter(folders))
        times, _ = ratios(folders, first, target, task.valid.arrays()[0], 20.0)
    for name, ratio in times.items():
        print(f"{name}: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times the latency of {first}")


if __name__ == "__main__":
    main()
