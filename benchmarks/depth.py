"""Depth of CIFAR ResNets: blocks removed, chosen together or one by one, without any training.

    PENJING_DATA=/path/to/data python benchmarks/depth.py [--depth 20 56] [--count 1 2 3] [--refit]

For each number of blocks three choices: the set that `RemoveBlocks` finds (`joint`), the blocks of the
smallest single divergences (`additive`), and those of least Block Influence (`influence`). Accuracy on 2,500
images as delivered for ONNX Runtime: as cut, with BatchNorm statistics re-estimated, and (`--refit`, slow)
with least squares before that. Latency in ONNX Runtime, batch 1, one thread, all networks interleaved, over
that of the whole network in float.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
import penjing as pj
from penjing.arrays.structure.removal import Judge, additive_choice, joint_choice
from penjing.backends.torch import BACKEND
from penjing.backends.torch.cut.shortened import Shortened
from penjing.backends.torch.structure.blocks import find_blocks
from penjing.measurement.measure import measure_all
from penjing.measurement.sittings import Effort

COUNTS = {20: (1, 2, 3), 56: (5, 10)}
EXAMPLES = {20: (128, 128), 56: (128,)}
"""Batches that shortened networks are judged on."""

EVALUATIONS = {20: 200, 56: 60}
"""Networks judged for each number of blocks."""

SECONDS = 20.0
"""For the rounds of latency, all networks together."""

CHOICES = ("joint", "additive", "influence")
WHOLE = "whole"


@dataclass(frozen=True)
class Choice:
    """A set of blocks, how it was found, and how far its outputs are from the whole network's."""

    count: int
    how: str
    names: tuple[str, ...]
    divergence: float


def choices(model: Any, task: pj.Task, depth: int, counts: list[int]) -> list[Choice]:
    """Return the sets that each way of choosing finds for each number of blocks."""
    blocks = find_blocks(model, task.valid.example())
    names = list(blocks.found)
    walk = zip(EXAMPLES[depth], itertools.count())
    batches = [next(iter(task.train.batches(size, seed)))[0] for size, seed in walk]
    shortened = Shortened(model, blocks, batches, model, logits=True)
    influences = shortened.influences()
    known: dict[tuple[int, ...], float] = {}
    found = []
    for count in counts:
        judge = Judge(lambda s: shortened.divergence([names[i] for i in s]), EVALUATIONS[depth], known)
        single = {i: judge((i,)) for i in range(len(names))}
        chosen = {
            "joint": joint_choice(range(len(names)), count, judge),
            "additive": additive_choice(single, count),
            "influence": additive_choice({i: influences[name] for i, name in enumerate(names)}, count),
        }
        for how in CHOICES:
            judge.most += 1
            found.append(Choice(count, how, tuple(names[i] for i in chosen[how]), judge(chosen[how])))
    return found


def plans(choice: Choice, refit: bool) -> dict[str, pj.Method | tuple[pj.Method, ...]]:
    """Return what is done with a choice, by the column that shows it."""
    remove = pj.only("|".join(choice.names), pj.RemoveBlocks(count=choice.count, score="influence"))
    statistics = pj.ReestimateBatchNorm(examples=768)
    if choice.how != "joint":
        return {"bn": pj.chain(remove, statistics)}
    found = {
        "cut": pj.chain(remove),
        "bn": pj.chain(remove, statistics),
        "int8": pj.chain(remove, statistics, pj.Int8Static(examples=256)),
    }
    if refit:
        found["ls"] = pj.chain(remove, pj.LeastSquares(examples=512), statistics)
    return found


def measured(model: Any, task: pj.Task, found: list[Choice], refit: bool) -> dict[str, Any]:
    """Return the measurements of all networks, and the whole one's in float and in integers."""
    wanted = {WHOLE: (), f"{WHOLE} int8": pj.chain(pj.Int8Static(examples=256))}
    for choice in found:
        for column, plan in plans(choice, refit).items():
            wanted[f"{short(choice.names)} {column}"] = plan
    entries, operations, example = {}, {}, task.valid.example()
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in wanted.items():
            result = pj.apply(model, plan, task).model if plan else model
            if isinstance(result, torch.nn.Module):
                operations[name] = BACKEND.operations(result, example)
            place = Path(folder) / str(next(numbers))
            pj.deliver(result, pj.Target(), place, example=example)
            entries[name] = (place, pj.Target(), None)
        return {
            name: one.measurement
            for name, one in measure_all(
                entries, task, "valid", WHOLE, operations, effort=Effort(SECONDS)
            ).items()
        }


def table(found: list[Choice], of: dict[str, Any]) -> str:
    """Return the table in Markdown."""

    def accuracy(name: str) -> str:
        return f"{of[name].quality.value:.2%}" if name in of else ""

    def ratio(name: str) -> str:
        if name not in of:
            return ""
        estimate = of[name].latency.ratio
        return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"

    head = (
        "removed",
        "choice",
        "blocks",
        "divergence",
        "as cut",
        "re-estimated",
        "refitted",
        "int8",
        "multiply-adds",
        "latency, float",
        "latency, int8",
    )
    whole, integers = of[WHOLE], of[f"{WHOLE} int8"]
    millions = f"{whole.operations.multiply_adds / 1e6:.1f} M"
    rows = [
        head,
        ["---"] * len(head),
        (
            "0",
            "",
            "",
            "",
            accuracy(WHOLE),
            "",
            "",
            f"{integers.quality.value:.2%}",
            millions,
            "1",
            ratio(f"{WHOLE} int8"),
        ),
    ]
    for choice in found:
        name = short(choice.names)
        millions = f"{of[f'{name} bn'].operations.multiply_adds / 1e6:.1f} M"
        rows.append(
            (
                str(choice.count),
                choice.how,
                short(choice.names),
                f"{choice.divergence:.3f}",
                accuracy(f"{name} cut"),
                accuracy(f"{name} bn"),
                accuracy(f"{name} ls"),
                accuracy(f"{name} int8"),
                millions,
                ratio(f"{name} bn"),
                ratio(f"{name} int8"),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def short(names: tuple[str, ...]) -> str:
    """Return block names as `1: 3 4, 2: 7`, by stage."""
    stages = itertools.groupby(names, lambda name: name.split(".")[0].removeprefix("layer"))
    return ", ".join(f"{stage}: {' '.join(n.split('.')[1] for n in group)}" for stage, group in stages)


def main() -> None:
    """Print one table for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56], choices=[20, 56])
    parser.add_argument("--count", type=int, nargs="+", help="blocks removed")
    parser.add_argument("--refit", action="store_true", help="also refit by least squares; minutes")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    task = cifar10.task().prepare()
    for depth in options.depth:
        start = time.process_time()
        cifar10.DEPTH = depth
        model, counts = cifar10.model(), options.count or list(COUNTS[depth])
        found = choices(model, task, depth, counts)
        chosen = time.process_time() - start
        of = measured(model, task, found, options.refit)
        print(
            f"\nResNet-{depth}: {chosen:.0f} s of one core to choose, "
            f"{time.process_time() - start:.0f} s in all here and in other processes less\n"
        )
        print(table(found, of), flush=True)


if __name__ == "__main__":
    main()
