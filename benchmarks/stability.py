"""What chance does to a sound recipe and to one at the edge of divergence: `pj.stability` on three data sets.

    PENJING_DATA=/path/to/data python benchmarks/stability.py [--seeds 5] [--out runs/stability]

Data: scikit-learn's 8 by 8 digits (1,000 to train on, 597 to test), Fashion-MNIST (3,000 and 3,000 images),
and UCI letter recognition (6,000 and 4,000 rows of 16 numbers, 26 classes). A small convolutional network for
images, two hidden layers for rows, six passes. The sound recipe is the default, SGD at 0.05 with a short
warm-up, linear decay and clipped gradients. The other has a rate many times as large, the same in all steps
from the first one on, and no clipping; the rates were looked for by hand, so that most runs still train.

Prints for each data set the mean with Student's 95% interval, the standard deviation over seeds and how many
times that is what test examples alone explain, the worst seed, flips (examples on which two runs differ), and
the mean accuracy on corrupted inputs; then whether the recipes differ by more than seeds explain.
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import penjing as pj
from language_models import data_file
from penjing.experiments.stability import Stability, TaskStability

SOUND = pj.Strategy(epochs=6, batch_size=64)
TIMES = {"digits": 20.0, "fashion": 20.0, "letters": 13.0}
"""How many times the sound rate the recipe at the edge takes."""


def net(task: pj.Task) -> nn.Module:
    """Return a fresh network for the inputs of a task."""
    (example,) = task.train.example()
    classes = int(task.train.targets.max()) + 1
    if example.ndim == 2:
        layers = [nn.Linear(example.shape[1], 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(96, classes))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def sound(task: pj.Task, seed: int) -> nn.Module:
    """Train by the default strategy."""
    return pj.fit(net(task), task, SOUND, seed=seed, say=lambda line: None).model


def edge(task: pj.Task, seed: int) -> nn.Module:
    """Train at the edge of divergence."""
    changes = {
        "lr": SOUND.peak_lr * TIMES[task.notes[0]],
        "schedule": "constant",
        "warmup": 0.0,
        "clip_norm": None,
    }
    return pj.fit(net(task), task, SOUND.model_copy(update=changes), seed=seed, say=lambda line: None).model


RECIPES = {"sound": sound, "at the edge": edge}


def divided(name: str, x: np.ndarray, y: np.ndarray, train: int, test: int) -> pj.Task:
    """Return a task on shuffled data, with a tenth as many examples in valid as there are to train on."""
    order = np.random.default_rng(0).permutation(len(x))[: train + train // 10 + test]
    x, y = x[order], y[order]
    cut = len(x) - test
    return pj.Task(
        train=(x[:train], y[:train]),
        valid=(x[train:cut], y[train:cut]),
        test=(x[cut:], y[cut:]),
        notes=(name,),
    )


def tasks() -> dict[str, pj.Task]:
    """Return the three data sets by name."""
    digits = load_digits()
    with np.load(data_file("cv/fashion_mnist.npz")) as data:
        fashion, kinds = data["train_images"], data["train_labels"].astype(np.int64)
    with gzip.open(data_file("tabular/letter_recognition.csv.gz"), "rt") as lines:
        rows = [line.strip().split(",") for line in lines][1:]
    letters = np.array([row[1:] for row in rows], np.float32)
    small = (digits.images[:, None] / 8 - 0.6).astype(np.float32)
    pictures = ((fashion[:, None] / 255 - 0.286) / 0.353).astype(np.float32)
    return {
        "digits": divided("digits", small, digits.target, 1000, 597),
        "fashion": divided("fashion", pictures, kinds, 3000, 3000),
        "letters": divided(
            "letters", letters / 4 - 1.5, np.array([ord(r[0]) - 65 for r in rows]), 6000, 4000
        ),
    }


def row(name: str, recipe: str, one: TaskStability) -> str:
    """Return a line of the table."""
    times = one.spread / one.sampling if one.sampling else float("nan")
    lost = sum(value is None for value in one.values)
    worst = f"{100 * one.worst:.1f}" + f", {lost} without a model" * bool(lost)
    bad = 100 * np.mean([mean for mean, _ in one.corrupted.values()])
    return (
        f"| {name} | {recipe} | {100 * one.mean:.1f} ({100 * one.low:.1f} to {100 * one.high:.1f}) "
        f"| {100 * one.spread:.2f} | {times:.1f} | {worst} | {100 * (one.flips or 0):.1f} | {bad:.1f} "
        f"| {'**unstable**' if one.unstable else 'stable'} |"
    )


def show(options: argparse.Namespace, out: Path) -> None:
    """Run both recipes and print the table."""
    found: dict[str, Stability] = {}
    for name, recipe in RECIPES.items():
        found[name] = pj.stability(
            recipe, tasks(), seeds=options.seeds, out=out / name, workers=options.workers
        )
    heads = (
        "data",
        "recipe",
        "accuracy (95%)",
        "spread",
        "times explained",
        "worst seed",
        "flips, %",
        "corrupted",
        "verdict",
    )
    print(f"\n| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    for name in TIMES:
        print(*(row(name, recipe, result.tasks[name]) for recipe, result in found.items()), sep="\n")
    print()
    for event in (event for result in found.values() for event in result.events):
        print(event)
    try:
        differences = found["sound"].against(found["at the edge"])
    except pj.Refused as refused:
        print(f"not compared: {refused}")
        return
    for name, difference in differences.items():
        print(f"{name}, at the edge minus sound: {difference}")


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="runs side by side; one for each core by default")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs; by default none is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        show(options, options.out or Path(folder))


if __name__ == "__main__":
    main()
