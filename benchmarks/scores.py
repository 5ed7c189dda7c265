"""Every score of PruneChannels at equal multiply-adds, with and without repair: accuracy over seeds of data.

    python benchmarks/scores.py [--networks digits resnet20] [--removed 0.5] [--seeds 3] [--images 1000]
        [--cpu-seconds 150] [--json FILE]

`digits`: a small residual network on scikit-learn's handwritten digits, trained here in seconds, once for
each seed. `resnet20`: the CIFAR ResNet-20 of `examples/cifar10.py` (needs PENJING_DATA); the seed chooses
the training images that scores and repair see. All networks lose the same share of multiply-adds; by local
selection their widths are equal. Nothing is trained after the cut. Repair is ReestimateBatchNorm or
LeastSquares. Rows appear as they are done; past the limit of processor seconds for a network the rest is left
out, and cells say how many seeds they have.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import penjing as pj
from penjing.arrays.scores import SCORES
from penjing.backends.torch import BACKEND
from penjing.core.apply import apply
from penjing.core.context import Context
from penjing.core.task import Split
from penjing.examples import digits

REPAIRS = {"BatchNorm": pj.ReestimateBatchNorm(examples=512), "least squares": pj.LeastSquares()}
SELECTIONS = ("local", "global", "isomorphic")
COMPARED = ("l2", "taylor", "fisher", "refit")
EPOCHS = 16

Cells = dict[tuple[str, str, str], list[float]]
"""Accuracies by (network, score and selection, repair), one for each seed."""


def digits_networks(options: argparse.Namespace) -> Iterator[tuple[torch.nn.Module, pj.Task, int]]:
    """Train a network on another division of the data for every seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = (data.images[:, None] / 16).astype(np.float32), data.target
    for seed in range(options.seeds):
        order = np.random.default_rng(seed).permutation(len(images))
        parts = np.split(order, [900, 1350])
        train, valid, test = (Split((images[p],), labels[p], n) for p, n in zip(parts, "abc", strict=True))
        torch.manual_seed(seed)
        model = digits.Net(16)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, EPOCHS * 15)
        for epoch in range(EPOCHS):
            for (x,), y in train.batches(64, seed * 100 + epoch):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
                optimizer.step()
                rate.step()
        yield model.eval(), pj.Task(train=train, valid=valid, test=test).prepare(), seed


def resnet_networks(options: argparse.Namespace) -> Iterator[tuple[torch.nn.Module, pj.Task, int]]:
    """Yield the adapted ResNet-20 with plain training images, once for every seed."""
    import cifar10

    data = cifar10.images()
    n = options.images
    x, y = cifar10.normalised(data["test_x"][: 2 * n]), data["test_y"][: 2 * n]
    train = cifar10.normalised(data["train_x"][:10000]), data["train_y"][:10000]
    model = cifar10.model()
    task = pj.Task(train=train, valid=(x[:n], y[:n]), test=(x[n:], y[n:])).prepare()
    for seed in range(options.seeds):
        yield model, task, seed


NETWORKS = {"digits": digits_networks, "resnet20": resnet_networks}


def accuracy(model: torch.nn.Module, task: pj.Task) -> float:
    """Return the percentage of validation images that are classified right."""
    right = sum(int((BACKEND.run(model, x).argmax(1) == y).sum()) for x, y in task.valid.batches(250))
    return 100 * right / len(task.valid)


def plan(score: str, selection: str, removed: float) -> pj.PruneChannels:
    """Return the cut; no rounding, so that all scores give the same widths."""
    return pj.PruneChannels(removed, of="multiply_adds", score=score, selection=selection, round_to=1)


def measure(network: str, options: argparse.Namespace, cells: Cells) -> dict[str, Any]:
    """Fill the cells of one network; return the accuracy of the dense ones and the shares really left."""
    rows = [(score, "local") for score in SCORES]
    rows += [(score, selection) for score in COMPARED for selection in SELECTIONS[1:]]
    known: dict[tuple[int, str, str, int], tuple[torch.nn.Module, float]] = {}
    dense, left, models, start = [], [], [], time.process_time()
    for model, task, seed in NETWORKS[network](options):
        models.append(model)  # keeps ids apart
        dense.append(accuracy(model, task))
        before = BACKEND.operations(model, task.valid.example()).multiply_adds
        context = Context(task=task, backend=BACKEND, original=model, seed=seed)
        for score, selection in rows:
            if time.process_time() - start > options.cpu_seconds:
                break
            # Weights alone decide: one cut for all seeds of the data.
            key = (id(model), score, selection, 0 if SCORES[score].needs == "weights" else seed)
            if key not in known:
                cut = apply(model, plan(score, selection, options.removed), task, context=context).model
                known[key] = cut, accuracy(cut, task)
                left.append(BACKEND.operations(cut, task.valid.example()).multiply_adds / before)
            cut, alone = known[key]
            found = {"none": alone}
            for name, repair in REPAIRS.items():
                found[name] = accuracy(apply(cut, repair, task, context=context).model, task)
            for name, value in found.items():
                cells.setdefault((network, f"{score} {selection}", name), []).append(value)
            print(f"{network} seed {seed}: {score} {selection}", *found.values(), file=sys.stderr, flush=True)
    return {
        "dense": statistics.mean(dense),
        "least": min(left, default=1.0),
        "most": max(left, default=1.0),
        "cpu_s": time.process_time() - start,
    }


def cell(values: list[float], seeds: int) -> str:
    """Return mean ± standard deviation over seeds, and how many there are where some are missing."""
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" + (f" ({len(values)})" if len(values) < seeds else "")


def table(cells: Cells, networks: list[str], seeds: int) -> Iterator[str]:
    """Yield the lines of a Markdown table, local selection first."""
    columns = [(n, r) for n in networks for r in ("none", *REPAIRS)]
    yield "| score, selection | " + " | ".join(f"{n}, repair: {r}" for n, r in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for row in dict.fromkeys(name for _, name, _ in cells):
        yield f"| {row} | " + " | ".join(cell(cells.get((n, row, r), []), seeds) for n, r in columns) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["digits"])
    parser.add_argument("--removed", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="of CIFAR-10, to judge by")
    parser.add_argument("--cpu-seconds", type=float, default=float("inf"), help="for each network")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "resnet20" in options.networks and not os.environ.get("PENJING_DATA"):
        parser.error("resnet20 needs PENJING_DATA")
    torch.set_num_threads(1)
    cells: Cells = {}
    facts: dict[str, Any] = {}
    for network in options.networks:
        facts[network] = measure(network, options, cells)
    for line in table(cells, options.networks, options.seeds):
        print(line)
    for network, found in facts.items():
        share = f"{found['least']:.1%} to {found['most']:.1%}"
        spent = f"{found['cpu_s']:.0f} s of processor"
        print(f"\n{network}: dense {found['dense']:.1f}; multiply-adds left {share}; {spent}")
    if options.json:
        rows = {" | ".join(key): values for key, values in cells.items()}
        options.json.write_text(json.dumps({"cells": rows, "facts": facts}, indent=1))


if __name__ == "__main__":
    main()
