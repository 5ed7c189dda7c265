"""How much a recipe's result depends on chance: seeds, divisions of the data, data sets, corruptions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.spread import (
    difference_interval,
    disagreement,
    equal_quality_p_value,
    mean_interval,
    sampling_spread,
)
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits, refused_from
from penjing.core.files import make_folder, read_json, write_json
from penjing.core.progress import Line, Say
from penjing.core.task import Task
from penjing.core.value import Value
from penjing.experiments.fit import to_stderr
from penjing.experiments.stability_job import run_once
from penjing.experiments.stability_recipe import Recipe, recipe_of
from penjing.measurement.quality import maximized, metric_name
from penjing.processes.local import LocalExecutor

RECORD = "stability.json"
LAYOUT = 2
"""Of the files of a finished run; those of another layout are left alone and the run is made again."""

SEVERITIES = (1, 3, 5)
CHANCE = 0.001
"""Probability below which the spread of seeds is not put down to the choice of test examples."""

NOTABLE = 0.1
"""Spread of the seeds, as a share of the mean error, from which on luck with the seed counts."""


class OneTask(Value):
    """What the runs on one data set came to, on its test split.

    Attributes:
        metric, up: the task's metric, and whether larger is better.
        values: of each seed, in order; None where training refused to go on, as when the loss diverged.
        mean, low, high: with Student's 95% interval.
        spread: standard deviation over the seeds.
        sampling: what the spread would be from the choice of test examples alone, were all seeds equally
            good. Where the metric is a mean of right and wrong: from the examples on which two runs differ
            (`penjing.arrays.spread.sampling_spread`); else the standard error of one run by bootstrap,
            which is larger. None: not known.
        unstable: whether the recipe is. Either a seed has no value; or the spread is more than test examples
            explain (were all seeds equally good, it came from them with a probability below 0.001: Cochran's
            test, `penjing.arrays.spread.equal_quality_p_value`) and more than a tenth of the mean error:
            1 - mean for a named metric, the mean's size for an own one to be minimized; an own one to be
            maximized has no scale, and there the test alone decides.
        worst: value of the worst seed.
        flips: share of test examples on which two runs predict differently; None: no classes.
        corrupted: by corruption, mean and worst over the seeds (each a mean over severities 1, 3 and 5).
    """

    metric: str
    up: bool
    values: tuple[float | None, ...]
    mean: float
    low: float
    high: float
    spread: float
    sampling: float | None
    unstable: bool
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
            Refused: other seeds, splits or data sets, or a seed without a value.
        """
        mine, theirs = ((s.seeds, s.splits, sorted(s.tasks)) for s in (self, other))
        if mine != theirs:
            raise Refused(
                "two recipes are compared on the same seeds, splits and data sets",
                value=theirs,
                place="against",
                fix=f"run the other with {mine}",
                code=Exit.USAGE,
            )
        found = {}
        for name, task in self.tasks.items():
            value, low, high = difference_interval(_all(task, name), _all(other.tasks[name], name))
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
    say: Say | None = None,
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
        Refused: bad arguments or data, before anything runs; a run broke down (no memory, killed), or fewer
            than two runs of a data set gave a model.
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
    folder = make_folder(out)
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
    say: Say,
    name: str,
    seed: int,
) -> dict[str, Any]:
    stem = hashlib.sha256(json.dumps([key, splits, severities, name, seed]).encode()).hexdigest()[:16]
    path, predictions = folder / f"run-{stem}.json", folder / f"run-{stem}.npz"
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
        say(Line.trial(f"{name}, seed {seed}: {reason}"))
        refused = ended.refusal is not None and ended.refusal.code == Exit.BAD_INPUT
        return {"failed": reason, "broke": not refused}
    write_json(path, ended.value)
    say(Line.trial(f"{name}, seed {seed}: {ended.value['quality']:.4g}, {ended.seconds:.1f} s"))
    return ended.value | {"file": str(predictions)}


def _key(recipe: Recipe, tasks: dict[str, Task]) -> str:
    """Return what the runs depend on: data, strategy, and the code of the function where it is known."""
    import inspect

    try:
        code = inspect.getsource(recipe.make)
    except (OSError, TypeError):
        code = repr(recipe.make)
    strategy = None if recipe.strategy is None else recipe.strategy.model_dump_json()
    parts = [LAYOUT, code, strategy, {name: task.fingerprint() for name, task in tasks.items()}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _all(task: OneTask, name: str) -> tuple[float, ...]:
    values = tuple(value for value in task.values if value is not None)
    if len(values) < len(task.values):
        raise Refused(
            "recipes are compared where every seed has a value",
            value=f"none for {name}",
            place="against",
            fix="see events; a recipe that diverges is unstable",
        )
    return values


def _summed(task: Task, ends: list[dict[str, Any]], events: tuple[str, ...], name: str) -> OneTask:
    done = [end for end in ends if "failed" not in end]
    if len(done) < 2 or any(end.get("broke") for end in ends):
        raise Refused(
            "every run ends",
            value="; ".join(events)[:300],
            place=f"stability of {name}",
            fix="see the logs beside the records; finished runs are kept",
        )
    values, up = [end["quality"] for end in done], maximized(task)
    worst = min if up else max
    mean, low, high = mean_interval(values)
    spread = float(np.std(values, ddof=1))
    classes, right = (_kept(done, kind) for kind in ("classes", "right"))
    sampling = sampling_spread(right) if right else _error([end["error"] for end in done])
    return OneTask(
        metric=metric_name(task),
        up=up,
        values=tuple(end.get("quality") for end in ends),
        mean=mean,
        low=low,
        high=high,
        spread=spread,
        sampling=sampling,
        unstable=len(done) < len(ends) or _differs(task, mean, spread, sampling, len(done)),
        worst=worst(values),
        flips=disagreement(classes) if classes else None,
        corrupted={
            kind: (
                float(np.mean([end["corrupted"][kind] for end in done])),
                worst(end["corrupted"][kind] for end in done),
            )
            for kind in done[0]["corrupted"]
        },
    )


def _differs(task: Task, mean: float, spread: float, sampling: float | None, runs: int) -> bool:
    """Tell whether seeds differ by more than test examples explain, and so much that it counts."""
    if sampling is None or equal_quality_p_value(spread, sampling, runs) >= CHANCE:
        return False
    if isinstance(task.metric, str):
        return spread > NOTABLE * (1 - mean)
    return maximized(task) or spread > NOTABLE * abs(mean)


def _kept(done: list[dict[str, Any]], kind: str) -> list[NDArray[Any]]:
    """Return what the runs kept of a kind; empty where they kept none."""
    found = []
    for end in done:
        with np.load(end["file"]) as arrays:
            found += [arrays[kind]] if kind in arrays else []
    return found


def _error(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if len(known) == len(errors) else None
