"""Distillation: students of their own architecture, alone and with each method.

    PENJING_DATA=/path/to/data python benchmarks/distillation.py [--work resnet20 half minilm]
        [--rows alone hinton standardized] [--seeds 3] [--epochs 10] [--examples 50000] [--out rows.jsonl]
    PENJING_DATA=/path/to/data python benchmarks/distillation.py --cache [--epochs 3] [--examples 10000]

`resnet20` and `half`: ResNet-56, adapted to the JPEG copies of CIFAR-10 (`examples/cifar10.py`), teaches a
ResNet-20 and a ResNet-56 of half its width, on shifted and mirrored images. `minilm`: the MiniLM-L6
classifier of SST-2 (`examples/minilm.py`) teaches one of two layers, on sentences with words masked at random
(it was trained on the plain ones and is sure of nearly all). Students start from weights drawn by the seed,
the same for all rows (`--from-teacher`: the MiniLM student from the teacher's embeddings, classifier and
layers 1 and 4); order and augmentation are the seed's too. All rows of a work train equally long, with one
optimizer, rate and schedule.

Each row is one line of JSON in `--out`, written as soon as it is there; rows that are there are not made
again, so that a run can be stopped and continued. Prints the mean accuracy on unseen test examples and the
difference to the student alone with a 95% interval (Student's t over the differences by seed).

`--cache`: seconds of training the ResNet-20 on images that do not change, with a teacher that runs on every
batch, that is remembered, that is kept on disk, and that is read from there.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.core.context import Context

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
import minilm

BATCH = 250
CLS, SEP, MASK = 101, 102, 103
MASKED = 0.15
How = dict[str, Any]

ROWS: dict[str, Callable[[How], pj.Method]] = {
    "alone": lambda how: pj.FineTune(**how),
    "hinton": lambda how: pj.Distill(standardize=False, temperature=4, **how),
    "standardized": lambda how: pj.Distill(**how),
    "dkd": lambda how: pj.Distill(loss="dkd", **how),
    "dist": lambda how: pj.Distill(loss="dist", **how),
    "features": lambda how: pj.DistillFeatures(**how),
    "attention": lambda how: pj.DistillFeatures(relation="attention", **how),
    "relational": lambda how: pj.DistillFeatures(relation="relational", **how),
    "relations": lambda how: pj.DistillRelations(**how),
}
"""By name; `relations` is for transformers only."""

HOW: dict[str, How] = {
    "resnet20": {"lr": 0.1, "schedule": "one_cycle", "batch_size": 128},
    "half": {"lr": 0.1, "schedule": "one_cycle", "batch_size": 128},
    "minilm": {"lr": 3e-4, "optimizer": "adamw", "weight_decay": 0.01, "batch_size": 32, "clip_norm": 1.0},
}


class Masked:
    """Batches of shuffled sentences, one word in so many masked at random; each walk is the next epoch."""

    def __init__(self, ids: Any, mask: Any, labels: Any, epoch: int) -> None:
        self.ids, self.mask, self.labels, self.epoch = ids, mask, labels, epoch
        self.size = HOW["minilm"]["batch_size"]

    def __len__(self) -> int:
        return -(-len(self.ids) // self.size)

    def __iter__(self) -> Iterator[Any]:
        rng = np.random.default_rng(self.epoch)
        self.epoch += 1
        words = (self.mask > 0) & (self.ids != CLS) & (self.ids != SEP)
        ids = np.where(words & (rng.random(self.ids.shape) < MASKED), MASK, self.ids)
        order = rng.permutation(len(ids))
        for start in range(0, len(order), self.size):
            index = order[start : start + self.size]
            yield (ids[index], self.mask[index]), self.labels[index]


def teacher_of(work: str) -> torch.nn.Module:
    """Return the trained teacher; it is cached."""
    if work == "minilm":
        return minilm.model("sst2")
    cifar10.DEPTH = 56
    return cifar10.model()


def student_of(work: str, seed: int, teacher: torch.nn.Module, from_teacher: bool) -> torch.nn.Module:
    """Return a student with weights drawn by the seed."""
    torch.manual_seed(seed)
    if work != "minilm":
        return cifar10.ResNet(20) if work == "resnet20" else cifar10.ResNet(56, width=8)
    net = minilm.MiniLM(2)
    net.encoder["layer"] = net.encoder["layer"][:2]
    if from_teacher:
        net.embeddings.load_state_dict(teacher.embeddings.state_dict())
        net.classifier.load_state_dict(teacher.classifier.state_dict())
        for mine, its in zip(net.encoder["layer"], (1, 4), strict=True):
            mine.load_state_dict(teacher.encoder["layer"][its].state_dict())
    return net


def task_of(work: str, examples: int, seed: int, live: bool = True) -> pj.Task:
    """Return the first so many training examples, and the test part in two: not judged on, and judged on."""
    if work == "minilm":
        parts = minilm.encoded("sst2")
        judged = {
            name: ((ids, mask), labels) for name, (ids, mask, labels) in parts.items() if name != "train"
        }
        return pj.Task(train=Masked(*(x[:examples] for x in parts["train"]), 10_000 * seed), **judged)
    data = cifar10.images()
    train = cifar10.Augmented(data["train_x"][:examples], data["train_y"][:examples])
    train.epoch = 10_000 * seed
    fixed = cifar10.normalised(train.images), train.labels
    x, y = cifar10.normalised(data["test_x"]), data["test_y"]
    return pj.Task(
        train=train if live else fixed,
        valid=(x[: cifar10.VALID], y[: cifar10.VALID]),
        test=(x[cifar10.VALID :], y[cifar10.VALID :]),
    )


def accuracy(model: torch.nn.Module, task: pj.Task, count: int) -> float:
    """Return the share of the first test examples that are recognised."""
    inputs, targets = task.test.arrays()
    inputs, targets = tuple(x[:count] for x in inputs), targets[:count]
    found = [
        BACKEND.run(model, tuple(x[i : i + BATCH] for x in inputs)).argmax(1)
        for i in range(0, len(targets), BATCH)
    ]
    return float((np.concatenate(found) == targets).mean())


def trained(
    student: torch.nn.Module, teacher: torch.nn.Module, task: pj.Task, method: pj.Method, seed: int
) -> Any:
    """Return what came of a student, alone or with its teacher."""
    if not isinstance(method, pj.FineTune):
        return pj.distill(student, teacher, task, method, seed=seed)
    context = Context(task=task, backend=BACKEND, original=student, seed=seed)
    return pj.apply(student, method, task, context=context)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line that is no JSON is left out", file=sys.stderr)
    return rows


def made(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows that are not in the file yet, as they are made."""
    known = [{key: row[key] for key in ("work", "row", "seed", "setting")} for row in read(options.out)]
    for work in options.work:
        teacher, best = None, 0.0
        for seed in range(options.seeds):
            for name in options.rows:
                key = {"work": work, "row": name, "seed": seed, "setting": setting(work, options)}
                if key in known or (name == "relations" and work != "minilm"):
                    continue
                task = task_of(work, options.examples, seed).prepare()
                if teacher is None:
                    teacher = teacher_of(work)
                    best = accuracy(teacher, task, options.judged)
                student = student_of(work, seed, teacher, options.from_teacher)
                start = time.perf_counter()
                try:
                    found = trained(student, teacher, task, ROWS[name](how(work, options)), seed)
                except pj.Refused as refused:
                    print(f"{work} {name}: {refused}", file=sys.stderr, flush=True)
                    continue
                yield key | {
                    "accuracy": accuracy(found.model, task, options.judged),
                    "teacher": best,
                    "seconds": round(time.perf_counter() - start, 1),
                    "steps": found.changes[0].detail["steps"],
                }


def how(work: str, options: argparse.Namespace) -> How:
    """Return how all rows of a work train."""
    given = {"lr": options.lr} if options.lr else {}
    return HOW[work] | given | {"epochs": options.epochs, "precision": options.precision}


def setting(work: str, options: argparse.Namespace) -> str:
    """Return what two rows must share to be compared."""
    start = " from teacher" * (options.from_teacher and work == "minilm")
    return f"{options.examples} examples, {options.judged} judged, {how(work, options)}{start}"


def show(options: argparse.Namespace) -> None:
    """Print the table of what is in the file."""
    print(
        "| student | row | seeds | accuracy % | against alone, points [95%] | seconds |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    for work in options.work:
        rows = [r for r in read(options.out) if (r["work"], r["setting"]) == (work, setting(work, options))]
        if rows:
            print(f"| {work} | teacher | | {100 * rows[0]['teacher']:.2f} | | |")
        found = {name: {r["seed"]: r for r in rows if r["row"] == name} for name in options.rows}
        for name, seeds in found.items():
            if not seeds:
                continue
            mean = 100 * np.mean([r["accuracy"] for r in seeds.values()])
            pairs = [
                100 * (r["accuracy"] - found["alone"][seed]["accuracy"])
                for seed, r in seeds.items()
                if seed in found.get("alone", {})
            ]
            words = "" if name == "alone" else interval(pairs)
            seconds = np.mean([r["seconds"] for r in seeds.values()])
            print(f"| {work} | {name} | {len(seeds)} | {mean:.2f} | {words} | {seconds:.0f} |")


def interval(differences: list[float]) -> str:
    """Return the mean of differences with a 95% interval by Student's t."""
    if len(differences) < 2:
        return f"{differences[0]:+.2f}" if differences else "not measured"
    mean = float(np.mean(differences))
    wide = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return f"{mean:+.2f} [{mean - wide:+.2f}, {mean + wide:+.2f}]"


def cache_gain(options: argparse.Namespace) -> None:
    """Print seconds of training with the teacher's outputs computed every time, remembered, and read."""
    teacher = teacher_of("resnet20")
    rows = (
        ("on every batch", True, False),
        ("remembered", False, False),
        ("kept on disk", False, True),
        ("read from disk", False, True),
    )
    print("| teacher's outputs | seconds | CPU seconds | seconds for the table |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="penjing-") as folder:
        os.environ["PENJING_CACHE"] = folder
        for name, live, cache in rows:
            task = task_of("resnet20", options.examples, 0, live=False)
            if live:
                x, y = task.train
                task = pj.Task(
                    train=lambda x=x, y=y: iter([(x, y)]),
                    valid=task.valid,
                    test=task.test,
                    max_examples=len(y),
                )
            task = task.prepare()
            method = pj.Distill(cache=cache, **how("resnet20", options))
            student = student_of("resnet20", 0, teacher, False)
            start, before = time.perf_counter(), time.process_time()
            notes = pj.distill(student, teacher, task, method).notes
            seconds, busy = time.perf_counter() - start, time.process_time() - before
            print(f"| {name} | {seconds:.1f} | {busy:.1f} | {notes.get('teacher_s', 0.0):.1f} |", flush=True)


def main() -> None:
    """Make the rows and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=list(HOW), default=list(HOW))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument(
        "--examples", type=int, default=50_000, help="training examples, all where there are fewer"
    )
    parser.add_argument("--judged", type=int, default=10_000, help="test examples, all where there are fewer")
    parser.add_argument("--lr", type=float, help="highest learning rate; the work's by default")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "auto"), default="float32")
    parser.add_argument("--from-teacher", action="store_true")
    parser.add_argument(
        "--cache", action="store_true", help="measure what the teacher's outputs on disk bring"
    )
    parser.add_argument("--out", type=Path, default=Path("distillation.jsonl"))
    options = parser.parse_args()
    if options.cache:
        cache_gain(options)
        return
    for row in made(options):
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    show(options)


if __name__ == "__main__":
    main()
