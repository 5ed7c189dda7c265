"""Structured pruning of CIFAR ResNets beside Torch-Pruning: accuracy, multiply-adds and latency.

    pip install torch-pruning
    PENJING_DATA=/path/to/data python benchmarks/structured.py [--depth 20] [--speed 1.5 2 2.5 4] [--epochs 3]

Both tools cut the same network (adapted to the JPEG copies, `examples/cifar10.py`) until the wanted share of
multiply-adds is gone, by the same scores on the same data. Then the same recovery: BatchNorm statistics
re-estimated for both (Torch-Pruning brings no repair; without any it is shown too), and distillation from
the dense network on the same fixed images. Penjing's further repair (least squares) is a row of its own, and
so are its score `refit` and its cuts to multiples of 16 channels, the widths that convolution kernels are
made for.
Accuracy on 9,500 test images with the interval of the paired difference to the dense network; latency in
ONNX Runtime, batch 1, one thread, all networks interleaved in one run.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.core.apply import apply
from penjing.core.context import Context
from penjing.measurement.compare import compare
from penjing.measurement.measure import Measured, measure_all
from penjing.measurement.sittings import Effort

CONFIDENCE = 0.95
RENEWED = 10
"""Steps of Torch-Pruning after which its gradients are taken anew."""

THEIR_SCORES = {"l2": "GroupMagnitudeImportance", "taylor": "GroupTaylorImportance"}
"""The importance of Torch-Pruning (with its defaults) for each score; others are ours alone."""

HELD_BACK = 500
"""Training images that stand in for a search split, which this comparison does not use."""


@dataclass
class Row:
    """One network of the table."""

    tool: str
    how: str
    speed: float
    model: torch.nn.Module
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return a short unique name."""
        return f"{self.tool}, {self.how}, {self.speed:g}x"


def task(train_images: int) -> pj.Task:
    """Return fixed training images, a few of them held back, and all 9,500 test images for the figures."""
    data = cifar10.images()
    x, y, spare = data["train_x"], data["train_y"], len(data["train_y"]) - HELD_BACK
    used = min(train_images, spare)
    return pj.Task(
        train=(cifar10.normalised(x[:used]), y[:used]),
        valid=(cifar10.normalised(x[spare:]), y[spare:]),
        test=(cifar10.normalised(data["test_x"]), data["test_y"]),
        class_names=cifar10.CLASSES,
    )


def step(model: torch.nn.Module, plan: Any, work: pj.Task, dense: torch.nn.Module) -> torch.nn.Module:
    """Apply a plan; `dense` is the original that repair and distillation look at."""
    return apply(model, plan, work, context=Context(task=work, backend=BACKEND, original=dense)).model


def torch_pruning(dense: torch.nn.Module, score: str, selection: str, speed: float, work: pj.Task) -> Any:
    """Prune with Torch-Pruning in small steps until the multiply-adds are down to the wanted share."""
    import torch_pruning as tp

    model = copy.deepcopy(dense)
    example = torch.zeros(1, 3, 32, 32)
    importance = getattr(tp.importance, THEIR_SCORES[score])()
    steps = 100
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        global_pruning=selection != "local",
        isomorphic=selection == "isomorphic",
        iterative_steps=steps,
        ignored_layers=[model.linear],
    )
    whole = tp.utils.count_ops_and_params(model, example)[0]
    for number in range(steps):
        if score == "taylor" and number % RENEWED == 0:
            gradients(model, work)
        pruner.step()
        if tp.utils.count_ops_and_params(model, example)[0] <= whole / speed:
            break
    model.zero_grad()
    return model


def gradients(model: torch.nn.Module, work: pj.Task, batches: int = 16, size: int = 32) -> None:
    """Sum the gradients of the loss over as many examples as Penjing's score uses."""
    model.eval()
    model.zero_grad()
    for number, (inputs, targets) in enumerate(work.train.batches(size, 0)):
        if number == batches:
            break
        output = model(torch.from_numpy(inputs[0]))
        torch.nn.functional.cross_entropy(output, torch.from_numpy(targets)).backward()


def ours(
    dense: torch.nn.Module, score: str, selection: str, speed: float, work: pj.Task, round_to: int = 1
) -> Any:
    """Prune with Penjing to the same share of multiply-adds."""
    share = 1 - 1 / speed
    cut = pj.PruneChannels(share, of="multiply_adds", score=score, selection=selection, round_to=round_to)
    return step(dense, cut, work, dense)


THEIRS, OURS, ROUNDED = "Torch-Pruning", "Penjing", "Penjing by 16"
TOOLS = {THEIRS: torch_pruning, OURS: ours, ROUNDED: partial(ours, round_to=16)}


def rows(dense: torch.nn.Module, work: pj.Task, speeds: list[float], cuts: list[str]) -> Iterator[Row]:
    """Cut with both tools at every speed; with and without repair, each a row."""
    for speed in speeds:
        for cut in cuts:
            score, selection = cut.split("-")
            tools = TOOLS if score in THEIR_SCORES else {name: TOOLS[name] for name in (OURS, ROUNDED)}
            for tool, prune in tools.items():
                start = time.perf_counter()
                try:
                    model = prune(dense, score, selection, speed, work)
                except pj.Refused as refused:
                    print(tool, cut, f"{speed:g}x:", refused, file=sys.stderr, flush=True)
                    continue
                seconds = time.perf_counter() - start
                yield Row(tool, f"{score} {selection}, no repair", speed, model, seconds)
                statistics = step(model, pj.ReestimateBatchNorm(), work, dense)
                yield Row(tool, f"{score} {selection}, BatchNorm", speed, statistics, seconds)
                if tool in (OURS, ROUNDED):
                    whole = step(model, pj.LeastSquares(), work, dense)
                    yield Row(
                        tool, f"{score} {selection}, least squares", speed, whole, time.perf_counter() - start
                    )


def measured(dense: torch.nn.Module, table: list[Row], work: pj.Task, seconds: float) -> dict[str, Measured]:
    """Deliver every network and measure all of them in one interleaved run."""
    example = work.valid.example()
    entries, operations = {}, {}
    with tempfile.TemporaryDirectory() as parent:
        for number, (name, model) in enumerate([("dense", dense), *((row.name, row.model) for row in table)]):
            folder = Path(parent) / str(number)
            pj.deliver(model, pj.Target(), folder, example=example)
            entries[name] = (folder, pj.Target(), None)
            operations[name] = BACKEND.operations(model, example)
        return measure_all(entries, work, "test", "dense", operations, effort=Effort(seconds))


def figures(row: Row | None, found: Measured, dense: Measured, work: pj.Task) -> dict[str, Any]:
    """Return what the table says of one network; drops in points, multiply-adds and latency in times."""
    m, base = found.measurement, dense.measurement
    bounds = compare(work, dense.outputs, found.outputs, work.test.targets).bounds(CONFIDENCE)
    ratio = m.latency.ratio
    return {
        "network": "dense" if row is None else row.name,
        "fewer": base.operations.multiply_adds / m.operations.multiply_adds,
        "accuracy": 100 * m.quality.value,
        "drop": [100 * value for value in (base.quality.value - m.quality.value, bounds.low, bounds.high)],
        "p50_ms": m.latency.p50_ms.value,
        "faster": None if ratio is None else [1 / ratio.value, 1 / ratio.high, 1 / ratio.low],
        "parameters": m.operations.parameters,
        "seconds": None if row is None else row.seconds,
    }


def line(f: dict[str, Any]) -> str:
    """Return one line of the table."""
    drop, low, high = f["drop"]
    faster = "1" if f["faster"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(*f["faster"])
    seconds = "" if f["seconds"] is None else f"{f['seconds']:.0f}"
    return (
        f"| {f['network']} | {f['fewer']:.2f} | {f['accuracy']:.2f} | {drop:.2f} [{low:.2f}, {high:.2f}] "
        f"| {f['p50_ms']:.3f} | {faster} | {f['parameters']:,} | {seconds} |"
    )


def distilled(row: Row, work: pj.Task, dense: torch.nn.Module, epochs: float) -> Row:
    """Train a cut network towards the dense one."""
    start = time.perf_counter()
    recipe = pj.Distill(epochs=epochs, lr=0.1, schedule="one_cycle", precision="bfloat16")
    model = step(row.model, pj.chain(recipe, pj.ReestimateBatchNorm()), work, dense)
    return Row(
        row.tool, f"{row.how}, {epochs:g} epochs", row.speed, model, row.seconds + time.perf_counter() - start
    )


def main() -> None:
    """Cut, recover, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--speed", type=float, nargs="+", default=[1.5, 2.0, 2.5, 4.0])
    parser.add_argument("--cuts", nargs="+", default=["l2-local", "taylor-global", "refit-global"])
    parser.add_argument(
        "--train", nargs="*", default=["taylor-global", "refit-global"], help="cuts that are distilled too"
    )
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of latency measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cifar10.DEPTH = options.depth
    dense, work = cifar10.model(), task(options.images).prepare()
    table = list(rows(dense, work, options.speed, options.cuts))
    for row in list(table):
        best = "least squares" if row.tool in (OURS, ROUNDED) else "BatchNorm"
        score, selection = row.how.split(",")[0].split()
        if options.epochs and row.how.endswith(best) and f"{score}-{selection}" in options.train:
            table.append(distilled(row, work, dense, options.epochs))
            print("trained", table[-1].name, f"{table[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    found = measured(dense, table, work, options.seconds)
    networks = [(None, "dense"), *((row, row.name) for row in table)]
    all_figures = [figures(row, found[name], found["dense"], work) for row, name in networks]
    if options.json:
        options.json.write_text(json.dumps(all_figures, indent=1))
    print(
        "| network | multiply-adds, times fewer | accuracy % | drop, points [95%] | p50 ms | "
        "times faster [95%] | parameters | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    print(*map(line, all_figures), sep="\n")


if __name__ == "__main__":
    main()
