"""How much a recipe's result depends on chance: seeds, divisions of the data, data sets, corruptions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from penjing.arrays.spread import difference_interval, disagreement, mean_interval
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits, refused_from
from penjing.core.files import read_json, write_json
from penjing.core.method import Value
from penjing.core.task import Task
from penjing.measuring.quality import maximized, metric_name
from penjing.run.fit import to_stderr
from penjing.run.stability_job import run_once
from penjing.run.stability_recipe import Recipe, recipe_of
from penjing.run.workers import LocalExecutor

RECORD = "stability.json"
SEVERITIES = (1, 3, 5)


class OneTask(Value):
    """What the runs on one data set came to, on its test split.

    Attributes:
        metric, up: the task's metric, and whether larger is better.
        values: of each seed, in order.
        mean, low, high: with Student's 95% interval.
        spread: standard deviation over the seeds.
        worst: value of the worst seed.
        flips: share of test examples on which two runs predict differently; None: no classes.
        corrupted: by corruption, mean and worst over the seeds (each a mean over severities 1, 3 and 5).
    """

    metric: str
    up: bool
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    spread: float
    worst: float
    flips: float | None
    corrupted: dict[str, tuple[float, float]]


class Difference(Value):
    """Second recipe minus first on one data set; `explained` where seeds alone could make it."""

    mean: float
    low: float
    high: float
    explained: bool

    def __str__(self) -> str:
        words = "no more than seeds explain" if self.explained else "more than seeds explain"
        return f"{self.mean:+.4g} ({self.low:+.4g} to {self.high:+.4g}): {words}"


class Stability(Value):
    """How a recipe's results vary.

    Attributes:
        seeds: that it ran with.
        splits: whether train and valid were divided anew for each seed.
        tasks: what came out, by data set.
        events: runs that ended without a result, and why.
    """

    seeds: tuple[int, ...]
    splits: Literal["fixed", "fresh"]
    tasks: dict[str, OneTask]
    events: tuple[str, ...] = ()

    def against(self, other: Stability) -> dict[str, Difference]:
        """Tell for every data set whether another recipe's results differ by more than seeds explain.

        The runs are paired by seed, which gives both recipes the same division of the data; the interval is
        Student's at 95%, other minus this.

        Raises:
            Refused: other seeds, splits or data sets.
        """
        mine, theirs = ((s.seeds, s.splits, sorted(s.tasks)) for s in (self, other))
        if mine != theirs:
            raise Refused("two recipes are compared on the same seeds, splits and data sets", value=theirs,
                          place="against", fix=f"run the other with {mine}", code=Exit.USAGE)  # fmt: skip
        found = {}
        for name, task in self.tasks.items():
            value, low, high = difference_interval(task.values, other.tasks[name].values)
            found[name] = Difference(mean=value, low=low, high=high, explained=low <= 0 <= high)
        return found


def stability(
    recipe: object,
    tasks: Task | Mapping[str, Task],
    *,
    seeds: int | tuple[int, ...] = 5,
    splits: Literal["fixed", "fresh"] = "fixed",
    corruptions: bool = True,
    out: Path | str,
    workers: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Stability:
    """Train and judge a recipe with several seeds, on one data set or several.

    Every run has a process of its own; finished ones are kept in `out` and not made again. Runs are judged on
    test: what is chosen by the result needs other data for its proof.

    Args:
        recipe: `(function that makes a model, Strategy)`, or a function of (task, seed) that returns a
            trained model.
        tasks: one task, or several by name.
        seeds: how many, from 0, or which; at least 2.
        splits: `fresh` divides train and valid anew for each seed.
        corruptions: whether the models are judged on corrupted inputs too (`penjing.arrays.corruptions`).
        out: folder of the runs.
        workers: runs side by side; None: one for each core. Each computes on its share of the cores.
        say: gets a line a run; by default they go to stderr.

    Raises:
        Refused: bad arguments or data, before anything runs; fewer than two runs of a data set ended.
    """
    made, chosen = recipe_of(recipe), tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(chosen)) < 2:
        raise Refused("stability takes at least two seeds", value=str(seeds), place="seeds", code=Exit.USAGE)
    if splits not in ("fixed", "fresh"):
        raise Refused("splits are fixed or fresh", value=repr(splits), place="splits", code=Exit.USAGE)
    named = {"data": tasks} if isinstance(tasks, Task) else dict(tasks)
    if not named:
        raise Refused("there is a task", value="none", place="tasks", code=Exit.USAGE)
    ready = {name: task.prepare(0) for name, task in named.items()}
    folder = Path(out).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(workers or cores, len(chosen) * len(ready)))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count)), "OMP_WAIT_POLICY": "PASSIVE"}
    severities = SEVERITIES if corruptions else ()
    with LocalExecutor((made, ready), logs=folder, environment=environment) as executor:
        one = partial(_one, executor, folder, splits, severities, _key(made, ready), say or to_stderr)
        jobs = [(name, seed) for name in ready for seed in chosen]
        with ThreadPoolExecutor(count) as pool:
            ends = dict(zip(jobs, pool.map(lambda job: one(*job), jobs), strict=True))
    events = tuple(
        f"{name}, seed {seed}: {end['failed']}" for (name, seed), end in ends.items() if "failed" in end
    )
    found = {
        name: _summed(task, [ends[name, seed] for seed in chosen], events, name)
        for name, task in ready.items()
    }
    result = Stability(seeds=chosen, splits=splits, tasks=found, events=events)
    write_json(folder / RECORD, result.model_dump(mode="json"))
    return result


def _one(
    executor: LocalExecutor,
    folder: Path,
    splits: str,
    severities: tuple[int, ...],
    key: str,
    say: Callable[[str], None],
    name: str,
    seed: int,
) -> dict[str, Any]:
    stem = hashlib.sha256(json.dumps([key, splits, severities, name, seed]).encode()).hexdigest()[:16]
    path, predictions = folder / f"run-{stem}.json", folder / f"run-{stem}.npy"
    if path.exists():
        before: dict[str, Any] = read_json(path)
        return before | {"file": str(predictions)}
    ended = executor.run(
        run_once, name, seed, splits == "fresh", severities, predictions, limits=Limits(), name=f"run-{stem}"
    )
    if ended.value is None:
        if ended.refusal is not None and ended.refusal.code == Exit.USAGE:
            raise refused_from(ended.refusal)
        reason = str(refused_from(ended.refusal)) if ended.refusal is not None else ended.reason
        say(f"{name}, seed {seed}: {reason}")
        return {"failed": reason}
    write_json(path, ended.value)
    say(f"{name}, seed {seed}: {ended.value['quality']:.4g}, {ended.seconds:.1f} s")
    return ended.value | {"file": str(predictions)}


def _key(recipe: Recipe, tasks: dict[str, Task]) -> str:
    """Return what the runs depend on: data, strategy, and the code of the function where it is known."""
    import inspect

    try:
        code = inspect.getsource(recipe.make)
    except (OSError, TypeError):
        code = repr(recipe.make)
    strategy = None if recipe.strategy is None else recipe.strategy.model_dump_json()
    parts = [code, strategy, {name: task.fingerprint() for name, task in tasks.items()}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _summed(task: Task, ends: list[dict[str, Any]], events: tuple[str, ...], name: str) -> OneTask:
    done = [end for end in ends if "failed" not in end]
    if len(done) < len(ends):
        raise Refused("every run ends", value="; ".join(events)[:300], place=f"stability of {name}",
                      fix="see the logs beside the records; finished runs are kept")  # fmt: skip
    values, up = [end["quality"] for end in done], maximized(task)
    worst = min if up else max
    mean, low, high = mean_interval(values)
    classes = [np.load(end["file"]) for end in done if end["predictions"]]
    kinds = done[0]["corrupted"]
    return OneTask(
        metric=metric_name(task),
        up=up,
        values=tuple(values),
        mean=mean,
        low=low,
        high=high,
        spread=float(np.std(values, ddof=1)),
        worst=worst(values),
        flips=disagreement(classes) if classes else None,
        corrupted={
            kind: (
                float(np.mean([end["corrupted"][kind] for end in done])),
                worst(end["corrupted"][kind] for end in done),
            )
            for kind in kinds
        },
    )
