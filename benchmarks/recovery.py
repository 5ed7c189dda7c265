"""Accuracy that training brings back after a cut of ResNet-20 by half: each way to train, the same seconds.

    PENJING_DATA=/path/to/data python benchmarks/recovery.py [--seconds 20 60] [--cuts inner whole]
        [--lr 0.01]

The network adapted to the JPEG copies of CIFAR-10 (`examples/cifar10.py`) loses half of its channels:
`whole` of all channels, those of the residual stream among them; `inner` those inside of the blocks, so that
blocks keep the shapes of their inputs and outputs, which learning block by block needs. `LeastSquares`
repairs the cut; every row goes on from that same network. Training is on the 50,000 copies, shifted and
mirrored anew in every pass, with each method's defaults but for length and rate.

Seconds are of the processor, since other work may share it: two short runs tell what a step of a method
costs, and so how many steps, all of one annealed schedule, fit. Prints accuracy on the 9,500 test copies with
Wilson's 95% interval, points below the uncut network with Tango's paired one, and the points regained a
minute over the repaired cut.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import penjing as pj
from penjing.arrays.statistics import tango_interval, wilson
from penjing.backends.torch import BACKEND
from penjing.core.context import Context

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
from one_shot_sparsity import right

REPAIRED_WITH = 1000
VALID = 250
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


def task() -> pj.Task:
    """Return training copies, changed anew in every pass, and all test copies to judge with."""
    data = cifar10.images()
    test = cifar10.normalised(data["test_x"]), data["test_y"]
    train = cifar10.Augmented(data["train_x"], data["train_y"])
    return pj.Task(train=train, valid=(test[0][:VALID], test[1][:VALID]), test=test)


def applied(
    original: torch.nn.Module, small: torch.nn.Module, kinds: tuple[str, ...], steps: list[int], lr: float
) -> tuple[torch.nn.Module, float]:
    """Return a network after some steps of each method, and the seconds of the processor that took."""
    prepared = task().prepare()
    batches = -(-len(prepared.train) // prepared.batch_size)
    epochs = [(count - 0.5) / batches for count in steps]
    plan = tuple(METHODS[kind](epochs=e, lr=lr) for kind, e in zip(kinds, epochs, strict=True))
    context = Context(task=prepared, backend=BACKEND, original=original)
    start = time.process_time()
    trained = pj.apply(small, plan, prepared, context=context).model
    return trained, time.process_time() - start


def step_seconds(original: torch.nn.Module, small: torch.nn.Module, kind: str, lr: float) -> float:
    """Return what a step of a method costs."""
    short, long = (applied(original, small, (kind,), [steps], lr)[1] for steps in (SHORT, LONG))
    return max(long - short, 1e-3) / (LONG - SHORT)


def show(options: argparse.Namespace) -> None:
    """Cut, then train in every way, and print the table."""
    model = cifar10.model()
    dense = right(model, task(), options.images)
    print(f"ResNet-20: {len(dense)} test images, {torch.get_num_threads()} thread(s)\n")
    heads = (
        "cut",
        "training",
        "steps",
        "seconds",
        "accuracy",
        "95%",
        "points lost",
        "95%",
        "regained a minute",
    )
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    print(line("none", "", "", 0.0, dense, dense, None), flush=True)
    for cut in options.cuts:
        repair = pj.LeastSquares(examples=REPAIRED_WITH)
        small = pj.apply(model, pj.chain(CUTS[cut], repair), task()).model
        start = right(small, task(), options.images)
        print(line(cut, "repaired only", "", 0.0, dense, start, None), flush=True)
        for name in options.rows:
            kinds = ROWS[name]
            try:
                costs = [step_seconds(model, small, kind, options.lr) for kind in kinds]
            except pj.Refused as refused:
                print(f"| {cut} | {name} | refused: {refused} |", flush=True)
                continue
            for seconds in options.seconds:
                steps = [max(1, int(seconds / len(kinds) / cost)) for cost in costs]
                trained, took = applied(model, small, kinds, steps, options.lr)
                found = right(trained, task(), options.images)
                words = " + ".join(f"{count}" for count in steps)
                print(line(cut, name, words, took, dense, found, start), flush=True)


def line(
    cut: str, name: str, steps: str, seconds: float, dense: NDArray[np.bool_], found: NDArray[np.bool_],
    start: NDArray[np.bool_] | None,
) -> str:  # fmt: skip
    """Return a row of the table."""
    accuracy, low, high = (100 * value for value in wilson(int(found.sum()), len(found)))
    lost, gained = int((dense & ~found).sum()), int((found & ~dense).sum())
    drop, least, most = (100 * value for value in tango_interval(lost, gained, len(dense)))
    back = "" if start is None else f"{100 * (found.mean() - start.mean()) * 60 / seconds:.1f}"
    return (f"| {cut} | {name} | {steps} | {seconds:.0f} | {accuracy:.2f} | {low:.2f} to {high:.2f} "
            f"| {drop:.2f} | {least:.2f} to {most:.2f} | {back} |")  # fmt: skip


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", nargs="+", choices=list(CUTS), default=list(CUTS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", nargs="+", type=float, default=[20.0, 60.0])
    parser.add_argument("--lr", type=float, default=0.01, help="highest rate, of every method")
    parser.add_argument("--images", type=int, default=10_000, help="test images at most")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    show(options)


if __name__ == "__main__":
    main()
