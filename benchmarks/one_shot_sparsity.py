"""One-shot sparsity of ResNet-20 on CIFAR-10, without training: what each method loses at 50 to 90% zeros.

    PENJING_DATA=/path/to/data python benchmarks/one_shot_sparsity.py [--view published] [--rows ours alps]

Two views. `adapted`: the network adapted to the JPEG copies (`examples/cifar10.py`), calibrated on training
copies, shifted and mirrored, tested on the 9,500 test copies. `published`: original weights, calibrated on
lossless training images, tested on 500 lossless test images, which tell differences of 2.5 points only.

Prints for each row and sparsity the accuracy, what is lost against the dense network with a paired 95%
interval (Tango), the share of zeros, and the seconds taken. A failure is a row with its reason.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import penjing as pj
from penjing.arrays.statistics import tango_interval
from penjing.backends.torch import BACKEND
from penjing.core.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10

BATCH = 250
TRAINING = 8192
"""Training images that calibration draws from, fewer where there are fewer."""

Table = dict[str, Callable[[float, int], Plan]]

ROWS: Table = {
    "magnitude": lambda s, n: (pj.PruneMagnitude(s),),
    "magnitude + BatchNorm": lambda s, n: (pj.PruneMagnitude(s), _batchnorm(n)),
    "magnitude + least squares": lambda s, n: (pj.PruneMagnitude(s), pj.LeastSquares(examples=n)),
    "OBC": lambda s, n: (pj.PruneOBC(s, examples=n),),
    "OBC + BatchNorm": lambda s, n: (pj.PruneOBC(s, examples=n), _batchnorm(n)),
    "OBC global": lambda s, n: (pj.PruneOBC(s, examples=n, allocation="global"),),
    "ALPS": lambda s, n: (pj.PruneALPS(s, examples=n),),
    "ALPS + BatchNorm": lambda s, n: (pj.PruneALPS(s, examples=n), _batchnorm(n)),
    "ALPS global, compensated": lambda s, n: (
        pj.PruneALPS(s, examples=n, allocation="global", compensate=True),
    ),
    "second order": lambda s, n: (pj.PruneSecondOrder(s, examples=min(n, 1000)),),
    "K-FAC": lambda s, n: (pj.PruneKFAC(s, examples=n, sequential=False, compensate=False),),
    "K-FAC + BatchNorm": lambda s, n: (
        pj.PruneKFAC(s, examples=n, sequential=False, compensate=False),
        _batchnorm(n),
    ),
    "ours": lambda s, n: (
        pj.PruneKFAC(s, examples=n, sequential=False, compensate=False),
        pj.LeastSquares(examples=n),
    ),
}
"""By name: the plan for a sparsity and a number of calibration images."""


def _batchnorm(examples: int) -> pj.Method:
    return pj.ReestimateBatchNorm(batches=max(1, examples // BATCH), size=BATCH)


def adapted() -> tuple[torch.nn.Module, pj.Task]:
    """Return the network adapted to the JPEG copies, with training and test copies."""
    data = cifar10.images()
    return cifar10.model(), _task(data, data["test_x"], data["test_y"])


def published() -> tuple[torch.nn.Module, pj.Task]:
    """Return the network with its published weights on lossless images."""
    with np.load(cifar10.data_folder() / "cv" / "cifar10_lossless_4500.npz") as stored:
        images = {part: stored[f"{part}_images"].transpose(0, 3, 1, 2) for part in ("train", "test")}
        labels = {part: stored[f"{part}_labels"].astype(np.int64) for part in images}
    train = {"train_x": images["train"], "train_y": labels["train"]}
    return cifar10.published().eval(), _task(train, images["test"], labels["test"])


def _task(data: dict[str, NDArray], test_x: NDArray[np.uint8], test_y: NDArray[np.int64]) -> pj.Task:
    """Return a task whose training images are shifted and mirrored, as the network saw them, once for all."""
    batches = list(islice(cifar10.Augmented(data["train_x"], data["train_y"]), TRAINING // 128))
    train = tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
    test = cifar10.normalised(test_x), test_y
    return pj.Task(train=train, valid=(test[0][:BATCH], test[1][:BATCH]), test=test, max_overlap=1)


def right(model: torch.nn.Module, task: pj.Task, count: int) -> NDArray[np.bool_]:
    """Return of each test image whether it is recognised."""
    (x,), y = task.prepare().test.arrays()
    x, y = x[:count], y[:count]
    outputs = [BACKEND.run(model, (x[i : i + BATCH],)) for i in range(0, len(x), BATCH)]
    return np.concatenate(outputs).argmax(1) == y


def sparsity_of(model: torch.nn.Module) -> float:
    """Return the share of zeros among the weights of convolutions and linear layers."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def line(name: str, dense: NDArray[np.bool_], found: NDArray[np.bool_]) -> str:
    """Return a row's accuracy and what it lost, in points."""
    lost, gained = int((dense & ~found).sum()), int((found & ~dense).sum())
    drop, low, high = (100 * value for value in tango_interval(lost, gained, len(dense)))
    return f"{name:<26} {100 * found.mean():6.2f}  {drop:6.2f} [{low:6.2f}, {high:6.2f}]"


def show(arguments: argparse.Namespace) -> None:
    """Print the table of one view."""
    model, task = {"adapted": adapted, "published": published}[arguments.view]()
    dense = right(model, task, arguments.images)
    print(
        f"{arguments.view}: {len(dense)} test images, {arguments.calibration} for calibration, "
        f"{torch.get_num_threads()} thread(s)"
    )
    print(f"{'':<8} {'':<26} accuracy  points lost [95%]     zeros  seconds")
    print(f"{'':<8} {line('dense', dense, dense)}")
    again = pj.apply(model, _batchnorm(arguments.calibration), task).model
    print(f"{'':<8} {line('dense + BatchNorm', dense, right(again, task, arguments.images))}", flush=True)
    for sparsity in arguments.sparsity:
        for name in arguments.rows:
            start = time.perf_counter()
            try:
                small = pj.apply(model, pj.chain(*ROWS[name](sparsity, arguments.calibration)), task).model
            except pj.Refused as refused:
                print(f"{sparsity:<8.0%} {name:<26} refused: {refused}", flush=True)
                continue
            seconds = time.perf_counter() - start
            text = line(name, dense, right(small, task, arguments.images))
            print(f"{sparsity:<8.0%} {text}  {sparsity_of(small):6.1%}  {seconds:7.1f}", flush=True)


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--view", choices=("adapted", "published"), default="adapted")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--calibration", type=int, default=1000, help="training images")
    parser.add_argument("--images", type=int, default=10_000, help="test images at most")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    show(arguments)


if __name__ == "__main__":
    main()
