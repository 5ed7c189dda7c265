"""Accuracy that training brings back after a cut of ResNet-20 by half: each way to train, the same seconds.

    PENJING_DATA=/path/to/data python benchmarks/recovery.py [--seconds 20 60] [--cuts inner whole]
        [--lr 0.01 0.05] [--seeds 3] [--schedule one_cycle]

The network adapted to the JPEG copies of CIFAR-10 (`examples/cifar10.py`) loses half of its channels:
`whole` of all channels, those of the residual stream among them; `inner` those inside of the blocks, so that
blocks keep the shapes of their inputs and outputs, which learning block by block needs. `LeastSquares`
repairs the cut; every row goes on from that same network. Training is on the 50,000 copies, shifted and
mirrored anew in every pass, with each method's defaults but for length, rate and schedule.

Seconds are of the processor, since other work may share it: two short runs tell what a step of a method
costs, and so how many steps, all of one annealed schedule, fit. Prints accuracy on the 9,500 test copies
(mean over the seeds of the training, with the lowest and highest), points below the uncut network, points
regained a minute over the repaired cut, and the difference to the first row of the same rate and seconds,
paired by seed, with a 95% interval by Student's t.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.core.context import Context

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
from distillation import interval
from one_shot_sparsity import right

REPAIRED_WITH = 1000
VALID = 250
PASSES = 1000
"""Passes between the data of two seeds."""

SHORT, LONG = 5, 20
"""Steps of the two runs that tell what a step costs."""

CUTS = {
    "inner": pj.only("layer*.conv1", pj.PruneChannels(0.5)),
    "whole": pj.PruneChannels(0.5),
}
METHODS = {
    "FineTune": pj.FineTune,
    "Distill": pj.Distill,
    "Distill by dist": partial(pj.Distill, loss="dist"),
    "DistillBlocks": pj.DistillBlocks,
}
ROWS = {
    "FineTune": ("FineTune",),
    "Distill": ("Distill",),
    "Distill by dist": ("Distill by dist",),
    "DistillBlocks": ("DistillBlocks",),
    "DistillBlocks, then Distill": ("DistillBlocks", "Distill"),
}
"""By name: methods that share the seconds evenly."""


def task(seed: int = 0) -> pj.Task:
    """Return training copies, changed anew in every pass and by every seed, and all test copies."""
    data = cifar10.images()
    test = cifar10.normalised(data["test_x"]), data["test_y"]
    train = cifar10.Augmented(data["train_x"], data["train_y"])
    train.epoch = PASSES * seed
    return pj.Task(train=train, valid=(test[0][:VALID], test[1][:VALID]), test=test, max_overlap=1)


@dataclass(frozen=True)
class Setting:
    """What rows that are compared share: the network before and after the cut, rate, schedule and seed."""

    original: torch.nn.Module
    small: torch.nn.Module
    lr: float
    schedule: str
    seed: int = 0


def applied(setting: Setting, kinds: tuple[str, ...], steps: list[int]) -> tuple[torch.nn.Module, float]:
    """Return a network after some steps of each method, and the seconds of the processor that took."""
    prepared = task(setting.seed).prepare()
    batches = -(-len(prepared.train) // prepared.batch_size)
    epochs = [(count - 0.5) / batches for count in steps]
    how = {"lr": setting.lr, "schedule": setting.schedule}
    plan = tuple(METHODS[kind](epochs=e, **how) for kind, e in zip(kinds, epochs, strict=True))
    context = Context(task=prepared, backend=BACKEND, original=setting.original, seed=setting.seed)
    start = time.process_time()
    trained = pj.apply(setting.small, plan, prepared, context=context).model
    return trained, time.process_time() - start


def step_seconds(setting: Setting, kind: str) -> float:
    """Return what a step of a method costs."""
    short, long = (applied(setting, (kind,), [steps])[1] for steps in (SHORT, LONG))
    return max(long - short, 1e-3) / (LONG - SHORT)


def show(options: argparse.Namespace) -> None:
    """Cut, then train in every way, and print the table."""
    model = cifar10.model()
    dense = accuracy(model, options)
    print(f"ResNet-20: {dense:.2f}%, {torch.get_num_threads()} thread(s), {options.seeds} seed(s)\n")
    heads = (
        "cut",
        "rate",
        "training",
        "steps",
        "seconds",
        "accuracy",
        "points lost",
        "regained a minute",
        f"against {options.rows[0]} [95%]",
    )
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    for cut in options.cuts:
        repair = pj.LeastSquares(examples=REPAIRED_WITH)
        small = pj.apply(model, pj.chain(CUTS[cut], repair), task()).model
        start = accuracy(small, options)
        print(f"| {cut} | | repaired only | | | {start:.2f} | {dense - start:.2f} | | |", flush=True)
        for lr in options.lr:
            setting = Setting(model, small, lr, options.schedule)
            for words in rows(setting, dense, start, options):
                print(f"| {cut} | {lr:g} | {words} |", flush=True)


def rows(setting: Setting, dense: float, start: float, options: argparse.Namespace) -> Iterator[str]:
    """Yield the rows of one cut and rate, without these two columns."""
    first: dict[float, list[float]] = {}
    for name in options.rows:
        kinds = ROWS[name]
        try:
            costs = [step_seconds(setting, kind) for kind in kinds]
        except pj.Refused as refused:
            yield f"{name} | refused: {refused}"
            continue
        for seconds in options.seconds:
            steps = [max(1, int(seconds / len(kinds) / cost)) for cost in costs]
            runs = [applied(replace(setting, seed=seed), kinds, steps) for seed in range(options.seeds)]
            found = [accuracy(trained, options) for trained, _ in runs]
            base = first.setdefault(seconds, found)
            pairs = [mine - other for mine, other in zip(found, base, strict=True)]
            mean, spent = float(np.mean(found)), float(np.mean([took for _, took in runs]))
            yield (
                f"{name} | {' + '.join(map(str, steps))} | {spent:.0f} "
                f"| {mean:.2f} ({min(found):.2f} to {max(found):.2f}) | {dense - mean:.2f} "
                f"| {(mean - start) * 60 / spent:.1f} | {'' if base is found else interval(pairs)}"
            )


def accuracy(model: torch.nn.Module, options: argparse.Namespace) -> float:
    """Return the percentage of the test copies that a network tells."""
    return 100 * float(right(model, task(), options.images).mean())


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", nargs="+", choices=list(CUTS), default=list(CUTS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", nargs="+", type=float, default=[20.0, 60.0])
    parser.add_argument("--lr", nargs="+", type=float, default=[0.01], help="highest rate, of every method")
    parser.add_argument("--schedule", default="linear", help="of every method")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="test images at most")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    show(options)


if __name__ == "__main__":
    main()
