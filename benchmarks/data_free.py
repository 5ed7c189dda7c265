"""Distillation without data: a teacher with BatchNorm, and a student of a third of its width.

    python benchmarks/data_free.py [--seeds 3] [--steps 300] [--examples 256 1024]

The student trains towards the teacher's outputs alone, no labels, the same number of steps in every row: on
the teacher's own training images, on inputs made from its BatchNorm statistics, and on noise of unit
variance. Images have mean 0 and deviation 1. Prints the mean accuracy on 797 unseen images with the lowest
and the highest of the seeds, how often the student says what the teacher says, and the CPU seconds of making
inputs and training on them. Scikit-learn's handwritten digits, one thread.
"""

import argparse
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.core.context import Context

TRAINED = 700
SIZE = 64


def network(width: int, seed: int) -> nn.Module:
    """Return three convolutions with BatchNorm for images [n, 1, 8, 8]."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for given, out, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        convolution = nn.Conv2d(given, out, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def task() -> pj.Task:
    """Return 700 images to train on, 300 to look at on the way, and 797 to judge on."""
    digits = load_digits()
    images = digits.images[:, None].astype(np.float32)
    images = (images - images.mean()) / images.std()
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.split(order, [TRAINED, 1000])
    names = ("train", "valid", "test")
    return pj.Task(**{n: (images[p], digits.target[p]) for n, p in zip(names, parts, strict=True)}).prepare()


def said(model: nn.Module, own: pj.Task) -> np.ndarray:
    """Return the class that a model gives each unseen image."""
    return BACKEND.run(model, own.test.inputs).argmax(1)


def main() -> None:
    """Train the teacher and all students, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--examples", type=int, nargs="+", default=[256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    own, how = task(), {"optimizer": "adam", "lr": 0.005, "batch_size": SIZE, "cache": False, "alpha": 1}
    start = network(24, 0)
    context = Context(task=own, backend=BACKEND, original=start)
    recipe = pj.FineTune(epochs=20, optimizer="adam", lr=0.005, batch_size=SIZE)
    teacher = pj.apply(start, recipe, own, context=context).model
    told = said(teacher, own)
    print(f"teacher: {100 * (told == own.test.targets).mean():.1f}%")
    print("| data | inputs | accuracy % | as the teacher % | CPU s |")
    print("|---|---|---|---|---|")
    rows = [("train", TRAINED), *((kind, n) for kind in ("synthetic", "noise") for n in options.examples)]
    for data, count in rows:
        made = {} if data == "train" else {"data": data, "examples": count}
        method = pj.Distill(epochs=options.steps * SIZE / count, **made, **how)
        began, seeds = time.process_time(), range(1, 1 + options.seeds)
        found = [pj.distill(network(8, seed), teacher, own, method, seed=seed) for seed in seeds]
        busy = (time.process_time() - began) / options.seeds
        classes = [said(one.model, own) for one in found]
        right = [100 * (c == own.test.targets).mean() for c in classes]
        alike = np.mean([100 * (c == told).mean() for c in classes])
        spread = f"{np.mean(right):.1f} ({min(right):.1f} to {max(right):.1f})"
        print(f"| {data} | {count} | {spread} | {alike:.1f} | {busy:.1f} |", flush=True)


if __name__ == "__main__":
    main()
