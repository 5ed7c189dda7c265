"""False claims and power of the certificate, metric by metric: simulated test splits through `certify`.

    python benchmarks/certificates.py [--runs 1000] [--out runs/certificates.jsonl] [--only NAME ...]

Each row is a metric on one kind of data at one number of examples. *False claims*: the candidate truly loses
exactly the limit, so that every certificate is false; the worse of two kinds of harm, one that touches few
examples and costs much on each (about two of them are expected, so that a test split often shows none), and
one spread thinly. *Power*: the candidate truly loses nothing, though a part of its answers changed. True
values are exact sums for classes, and means over a million draws for errors. Stated: 5% false claims at
most.

Rows go to the file as they are finished; what is there already is not simulated again. Prints the table.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import penjing as pj
from penjing.arrays.statistics import clopper_pearson
from penjing.core.errors import Refused
from penjing.measurement.certify import certify
from penjing.measurement.quality import weighted_scores

SIZES = (100, 1_000, 10_000)
RIGHT = 0.9
"""Share of the baseline's predictions that are right, in every class."""
RARE = 2.0
"""Expected number of harmed examples, or groups, where few are harmed."""
GROUP = 10
COPIES = 5
LONG_DRAW = 1_000_000
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Draw = Callable[[np.random.Generator, int], Arrays]
"""Makes baseline outputs, candidate outputs and targets of so many independent examples."""


@dataclass(frozen=True)
class Case:
    """One metric on one kind of data.

    Attributes:
        name: for the table.
        task: its metric, direction and range.
        harms: of a number of independent examples, each kind of harm with the true drop.
        same: makes a candidate that loses nothing.
        limit: for which power is measured.
        repeats: how many examples each independent one becomes.
        copies: whether these are exact copies, which `Task.prepare` counts once, or else groups.
    """

    name: str
    task: pj.Task
    harms: Callable[[int], dict[str, tuple[Draw, float]]]
    same: Draw
    limit: float
    repeats: int = 1
    copies: bool = False


def claims(case: Case, draw: Draw, limit: float, n: int, runs: int, seed: int) -> int:
    """Return in how many of the runs the candidate is certified at a limit."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(runs):
        drawn = draw(rng, n // case.repeats)
        before, after, targets = (np.repeat(x, case.repeats, axis=0) for x in drawn)
        groups = np.repeat(np.arange(n // case.repeats), case.repeats) if case.repeats > 1 else None
        if case.copies:
            kept = distinct(groups, targets)
            before, after, targets, groups = before[kept], after[kept], targets[kept], None
        try:
            found += (
                certify(before, [("candidate", after)], targets, case.task, limit, 0.95, groups)[1]
                is not None
            )
        except Refused:
            continue  # a rare class has no example: there is no metric, and nothing is claimed
    return found


def distinct(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the examples that `Task.prepare` leaves of a test split whose inputs are these numbers."""
    rows = numbers[:, None].astype(np.float32)
    other = (-1 - np.arange(4, dtype=np.float32)[:, None], np.zeros(4, np.int64))
    valid = (other[0] - 4, other[1])
    made = pj.Task(train=other, valid=valid, test=(rows, targets)).prepare().test
    first = np.unique(numbers, return_index=True)[1]
    assert len(made) == len(first)
    return first


# Classes


def cells(shares: np.ndarray, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every (target, before, after) and its probability.

    Args:
        shares: `[classes]`, of the targets.
        moved: `[classes, classes, classes]`, probability of the prediction after, given target and before.
    """
    classes = len(shares)
    first = np.full((classes, classes), (1 - RIGHT) / (classes - 1))
    np.fill_diagonal(first, RIGHT)
    mass = shares[:, None, None] * first[:, :, None] * moved
    return np.array(list(np.ndindex(mass.shape))), mass.ravel()


def of_classes(shares: np.ndarray, moved: np.ndarray, scored: bool) -> Draw:
    """Return a draw of predictions as scores `[n, classes]`."""
    found, mass = cells(shares, moved)
    scores = np.eye(len(shares), dtype=np.float32)

    def draw(rng: np.random.Generator, n: int) -> Arrays:
        target, before, after = found[rng.choice(len(mass), n, p=mass / mass.sum())].T
        if (
            scored
        ):  # top 3: the class that was predicted is among the first three, the two beside it are others
            return ranked(scores, before), ranked(scores, after), target
        return scores[before], scores[after], target

    return draw


def ranked(scores: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Return scores whose first is a class and whose next two are the classes after it."""
    classes = len(scores)
    return 3 * scores[best] + 2 * scores[(best + 1) % classes] + scores[(best + 2) % classes]


def staying(classes: int) -> np.ndarray:
    """Return the probabilities of a candidate that changes nothing."""
    return np.broadcast_to(np.eye(classes), (classes, classes, classes)).copy()


def drop_of(metric: str, shares: np.ndarray, moved: np.ndarray) -> float:
    """Return the true drop of a metric."""
    found, mass = cells(shares, moved)
    target, before, after = found.T
    if metric == "top3":
        near = [(target - predictions) % len(shares) < 3 for predictions in (before, after)]
        return float(mass @ near[0] - mass @ near[1])
    name = "f1_micro" if metric == "accuracy" else metric
    first, second = (weighted_scores(name, x, target, mass[None])[0] for x in (before, after))
    return float(first - second)


def class_case(name: str, metric: str, shares: list[float], limit: float, **how: Any) -> Case:
    """Return a case of a named metric; the harm is done to the last class, or to all."""
    share, classes = np.array(shares), len(shares)

    def harms(n: int) -> dict[str, tuple[Draw, float]]:
        few, thin = staying(classes), staying(classes)
        rate = min(0.9, RARE / (n * share[-1]))
        few[-1, -1] *= 1 - rate
        few[-1, -1, 0] += rate
        thin *= 0.94
        thin += 0.06 * np.eye(classes)[np.arange(1, classes + 1) % classes][None]
        kinds = {"few": few, "thin": thin}
        return {
            kind: (of_classes(share, moved, metric == "top3"), drop_of(metric, share, moved))
            for kind, moved in kinds.items()
        }

    again = np.full((classes, classes), (1 - RIGHT) / (classes - 1))
    np.fill_diagonal(again, RIGHT)
    same = 0.95 * staying(classes) + 0.05 * again[:, None, :]
    return Case(
        name, pj.Task(None, metric=metric), harms, of_classes(share, same, metric == "top3"), limit, **how
    )


# Errors and queries


def mae(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean absolute error."""
    return float(np.abs(outputs[:, 0] - targets).mean())


def rmse(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the root of the mean squared error."""
    return float(np.sqrt(((outputs[:, 0] - targets) ** 2).mean()))


def log_loss(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean negative log likelihood of logits."""
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-logs[np.arange(len(targets)), targets].mean())


def ndcg(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean normalized discounted cumulative gain of scores `[n, items]` of given relevance."""
    discount = 1 / np.log2(2 + np.arange(targets.shape[1]))
    gained = np.take_along_axis(targets, np.argsort(-outputs, axis=1, kind="stable"), axis=1) @ discount
    best = -np.sort(-targets, axis=1) @ discount
    return float((gained / best).mean())


def regression(rng: np.random.Generator, n: int, share: float, size: float, noise: float) -> Arrays:
    """Return predictions of errors about 0.3; a share of the candidate's is off by a size, all by noise."""
    targets = rng.normal(size=n)
    before = targets + rng.normal(size=n) * 0.3
    after = before + rng.normal(size=n) * noise + np.where(rng.random(n) < share, size, 0.0)
    return before[:, None], after[:, None], targets


def logits(rng: np.random.Generator, n: int, share: float, size: float, noise: float) -> Arrays:
    """Return logits of three classes; a share of the candidate's is sure of another class."""
    targets = rng.integers(0, 3, n)
    before = rng.normal(size=(n, 3)) + 3 * np.eye(3)[targets]
    after = before + rng.normal(size=(n, 3)) * noise
    after[np.arange(n), (targets + 1) % 3] += np.where(rng.random(n) < share, size, 0.0)
    return before, after, targets


def queries(rng: np.random.Generator, n: int, share: float, size: float, noise: float) -> Arrays:
    """Return scores of ten items, two of them relevant; some of the candidate's rankings are turned round."""
    targets = np.zeros((n, 10))
    targets[:, :2] = 1
    before = targets * 2 + rng.normal(size=(n, 10))
    after = before + rng.normal(size=(n, 10)) * noise
    return before, np.where((rng.random(n) < share)[:, None], -size * after, after), targets


def _drawn(make: Any, parts: tuple[float, float, float], rng: np.random.Generator, n: int) -> Arrays:
    found: Arrays = make(rng, n, *parts)
    return found


def error_case(
    metric: Any, make: Any, ends: tuple[float, float], size: float, limit: float, **how: Any
) -> Case:
    """Return a case of a metric that is a function."""
    direction = "maximize" if metric is ndcg else "minimize"
    task = pj.Task(None, metric=metric, direction=direction, metric_range=ends)

    def harms(n: int) -> dict[str, tuple[Draw, float]]:
        kinds = {"few": (RARE / n, size, 0.0), "thin": (0.0, size, 0.3)}
        found = {}
        for kind, parts in kinds.items():
            before, after, targets = make(np.random.default_rng(1), LONG_DRAW, *parts)
            drop = metric(after, targets) - metric(before, targets)
            found[kind] = (partial(_drawn, make, parts), drop if direction == "minimize" else -drop)
        return found

    return Case(
        how.pop("name", metric.__name__),
        task,
        harms,
        lambda rng, n: make(rng, n, 0.0, size, 0.02),
        limit,
        **how,
    )


def cases() -> Iterator[Case]:
    """Yield every row of the table."""
    even = [0.1] * 10
    yield class_case("accuracy, ten classes", "accuracy", even, 0.02)
    yield class_case("top 3, ten classes", "top3", even, 0.02)
    kinds = {
        "ten classes": (even, 0.05),
        "a class of 5%": ([0.95, 0.05], 0.1),
        "a class of 1%": ([0.99, 0.01], 0.1),
    }
    for metric in ("precision_macro", "recall_macro", "f1_macro"):
        for words, (shares, limit) in kinds.items():
            yield class_case(f"{metric}, {words}", metric, shares, limit)
    yield error_case(mae, regression, (0, 5), 4.5, 0.05)
    yield error_case(rmse, regression, (0, 5), 4.5, 0.05)
    yield error_case(ndcg, queries, (0, 1), 1.0, 0.02)
    yield error_case(log_loss, logits, (0, 10), 12.0, 0.05)
    copied = {"repeats": COPIES, "copies": True}
    yield class_case(f"accuracy, {COPIES} copies", "accuracy", even, 0.02, **copied)
    yield class_case(f"f1_macro, {COPIES} copies", "f1_macro", even, 0.05, **copied)
    grouped = {"repeats": GROUP}
    yield class_case(f"accuracy, groups of {GROUP}", "accuracy", even, 0.02, **grouped)
    yield class_case(f"recall_macro, groups of {GROUP}", "recall_macro", even, 0.05, **grouped)
    yield class_case(f"f1_macro, groups of {GROUP}", "f1_macro", even, 0.05, **grouped)
    yield error_case(mae, regression, (0, 5), 4.5, 0.05, name=f"mae, groups of {GROUP}", **grouped)


def row_of(case: Case, n: int, runs: int) -> dict[str, Any]:
    """Simulate one row."""
    seed = zlib.crc32(f"{case.name}|{n}".encode())
    worst, kind, limit = -1, "", 0.0
    for name, (draw, drop) in case.harms(n // case.repeats).items():
        found = claims(case, draw, drop, n, runs, seed)
        if found > worst:
            worst, kind, limit = found, name, drop
    certified = claims(case, case.same, case.limit, n, runs, seed + 1)
    return {
        "case": case.name,
        "n": n,
        "runs": runs,
        "harm": kind,
        "true_drop": limit,
        "false": worst,
        "limit": case.limit,
        "certified": certified,
    }


def printed(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    low, high = clopper_pearson(row["false"], row["runs"], 0.05)
    cells = (
        row["case"],
        f"{row['n']:,}",
        f"{row['runs']:,}",
        f"{row['true_drop']:.2%}",
        f"{row['false'] / row['runs']:.1%} ({low:.1%} to {high:.1%})",
        f"{row['limit']:.0%}",
        f"{row['certified'] / row['runs']:.0%}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Simulate what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--out", type=Path, default=Path("runs/certificates.jsonl"))
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(row["case"], row["n"]): row for row in map(json.loads, lines)}
    print("| metric and data | n | runs | true drop | false claims | limit | power |")
    print("|---|---|---|---|---|---|---|")
    for case in cases():
        if options.only and not any(part in case.name for part in options.only):
            continue
        for n in SIZES:
            row = done.get((case.name, n))
            if row is None:
                slow = callable(case.task.metric) or case.repeats == GROUP
                runs = max(100, options.runs // 5) if slow and n == SIZES[-1] else options.runs
                row = row_of(case, n, runs)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(printed(row), flush=True)


if __name__ == "__main__":
    main()
