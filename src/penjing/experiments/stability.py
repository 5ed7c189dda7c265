"""How much the result of training depends on chance: seeds, divisions of the data, data sets, corruptions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from penjing.core.executor import Finished, Limits, refused_from
from penjing.core.files import make_folder, read_json, write_json
from penjing.core.progress import Line, Say
from penjing.core.task import Task
from penjing.core.value import Value
from penjing.experiments.fit import to_stderr
from penjing.experiments.procedure import TrainingProcedure, read_procedure
from penjing.experiments.stability_job import SeedResult, run_once
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


class TaskStability(Value):
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
        unstable: whether training is. Either a seed has no value; or the spread is more than test examples
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
    """Second procedure minus first on one data set; `explained` where seeds alone could make it.

    >>> print(Difference(mean=0.012, low=-0.003, high=0.027, explained=True))
    +0.012 (-0.003 to +0.027): no more than seeds explain
    """

    mean: float
    low: float
    high: float
    explained: bool

    def __str__(self) -> str:
        words = "no more than seeds explain" if self.explained else "more than seeds explain"
        return f"{self.mean:+.4g} ({self.low:+.4g} to {self.high:+.4g}): {words}"


class Stability(Value):
    """How the results of a training procedure vary.

    Attributes:
        seeds: that it ran with.
        splits: whether train and valid were divided anew for each seed.
        tasks: what came out, by data set.
        events: runs that ended without a result, and why.
    """

    seeds: tuple[int, ...]
    splits: Literal["fixed", "fresh"]
    tasks: dict[str, TaskStability]
    events: tuple[str, ...] = ()

    def against(self, other: Stability) -> dict[str, Difference]:
        """Tell for every data set whether another procedure's results differ by more than seeds explain.

        The runs are paired by seed, which gives both the same division of the data; the interval is
        Student's at 95%, other minus this.

        Raises:
            Refused: other seeds, splits or data sets, or a seed without a value.
        """
        mine, theirs = ((s.seeds, s.splits, sorted(s.tasks)) for s in (self, other))
        if mine != theirs:
            raise Refused(
                "both procedures must have run on the same seeds, splits and data sets",
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
    procedure: object,
    tasks: Task | Mapping[str, Task],
    *,
    seeds: int | tuple[int, ...] = 5,
    splits: Literal["fixed", "fresh"] = "fixed",
    corruptions: bool = True,
    out: Path | str,
    workers: int | None = None,
    say: Say | None = None,
) -> Stability:
    """Train and judge a procedure with several seeds, on one data set or several.

    Every run has a process of its own; finished ones are kept in `out` and not made again. Runs are judged on
    test: what is chosen by the result needs other data for its proof.

    Args:
        procedure: `(function that makes a model, Strategy)`, or a function of (task, seed) that returns a
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
    made, chosen = read_procedure(procedure), tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(chosen)) < 2:
        raise _refuse("seeds", "must be at least two", seeds, "give seeds=5, or several of them")
    if splits not in ("fixed", "fresh"):
        raise _refuse("splits", "must be 'fixed' or 'fresh'", repr(splits), "choose one of the two")
    named = {"data": tasks} if isinstance(tasks, Task) else dict(tasks)
    if not named:
        raise _refuse("tasks", "needs at least one task", "none", "give a Task, or several by name")
    ready = {name: task.prepare(0) for name, task in named.items()}
    folder = make_folder(out)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(workers or cores, len(chosen) * len(ready)))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count)), "OMP_WAIT_POLICY": "PASSIVE"}
    severities = SEVERITIES if corruptions else ()
    with LocalExecutor((made, ready), logs=folder, environment=environment) as executor:
        runs = _Runs(executor, folder, splits, severities, _key(made, ready), say or to_stderr)
        jobs = [(name, seed) for name in ready for seed in chosen]
        with ThreadPoolExecutor(count) as pool:
            ends = dict(zip(jobs, pool.map(lambda job: runs.run(*job), jobs), strict=True))
    events = tuple(f"{name}, seed {seed}: {end.failure}" for (name, seed), end in ends.items() if end.failure)
    found = {
        name: _summarize(task, [ends[name, seed] for seed in chosen], events, name)
        for name, task in ready.items()
    }
    result = Stability(seeds=chosen, splits=splits, tasks=found, events=events)
    write_json(folder / RECORD, result.model_dump(mode="json"))
    return result


def _refuse(place: str, rule: str, value: object, fix: str) -> Refused:
    return Refused(rule, value=value, place=f"stability.{place}", fix=fix, code=Exit.USAGE)


@dataclass(frozen=True)
class _End:
    """How one run ended.

    Attributes:
        predictions: file of the predictions.
        result: None where training did not give a model.
        failure: why not, in words.
        broke: whether the run broke down, so that it says nothing of the procedure.
    """

    predictions: Path
    result: SeedResult | None = None
    failure: str = ""
    broke: bool = False


@dataclass(frozen=True)
class _Runs:
    """Makes runs, each in a process of its own, or reads those that are finished."""

    executor: LocalExecutor
    folder: Path
    splits: str
    severities: tuple[int, ...]
    key: str
    say: Say

    def run(self, name: str, seed: int) -> _End:
        asked = [self.key, self.splits, self.severities, name, seed]
        stem = "run-" + hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        path, predictions = self.folder / f"{stem}.json", self.folder / f"{stem}.npz"
        if path.exists():
            return _End(predictions, SeedResult.model_validate(read_json(path)))
        arguments = (name, seed, self.splits == "fresh", self.severities, predictions)
        ended = self.executor.run(run_once, *arguments, limits=Limits(), name=stem)
        if ended.value is None:
            return self._failed(ended, predictions, f"{name}, seed {seed}")
        result = SeedResult.model_validate(ended.value)
        write_json(path, ended.value)
        self.say(Line.trial(f"{name}, seed {seed}: {result.quality:.4g}, {ended.seconds:.1f} s"))
        return _End(predictions, result)

    def _failed(self, ended: Finished, predictions: Path, which: str) -> _End:
        refusal = ended.refusal
        if refusal is not None and refusal.code == Exit.USAGE:
            raise refused_from(refusal)
        reason = ended.reason if refusal is None else str(refused_from(refusal))
        self.say(Line.trial(f"{which}: {reason}"))
        broke = refusal is None or refusal.code != Exit.BAD_INPUT
        return _End(predictions, failure=reason, broke=broke)


def _key(procedure: TrainingProcedure, tasks: dict[str, Task]) -> str:
    """Return what the runs depend on: data, strategy, and the code of the function where it is known."""
    import inspect

    try:
        code = inspect.getsource(procedure.make)
    except (OSError, TypeError):
        code = repr(procedure.make)
    strategy = None if procedure.strategy is None else procedure.strategy.model_dump_json()
    parts = [LAYOUT, code, strategy, {name: task.fingerprint() for name, task in tasks.items()}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _all(task: TaskStability, name: str) -> tuple[float, ...]:
    values = tuple(value for value in task.values if value is not None)
    if len(values) < len(task.values):
        raise Refused(
            "every seed must have a value to compare",
            value=f"none for {name}",
            place="against",
            fix="see events; a procedure that diverges is unstable",
        )
    return values


def _summarize(task: Task, ends: list[_End], events: tuple[str, ...], name: str) -> TaskStability:
    results = [end.result for end in ends if end.result is not None]
    if len(results) < 2 or any(end.broke for end in ends):
        raise Refused(
            "every run must come to its end",
            value="; ".join(events)[:300],
            place=f"stability of {name}",
            fix="see the logs beside the records; finished runs are kept",
        )
    values, up = [result.quality for result in results], maximized(task)
    worst = min if up else max
    mean, low, high = mean_interval(values)
    spread = float(np.std(values, ddof=1))
    files = [end.predictions for end in ends if end.result is not None]
    classes, right = (_read_predictions(files, kind) for kind in ("classes", "right"))
    sampling = sampling_spread(right) if right else _root_mean_square([r.error for r in results])
    return TaskStability(
        metric=metric_name(task),
        up=up,
        values=tuple(None if end.result is None else end.result.quality for end in ends),
        mean=mean,
        low=low,
        high=high,
        spread=spread,
        sampling=sampling,
        unstable=len(results) < len(ends) or _differs(task, mean, spread, sampling, len(results)),
        worst=worst(values),
        flips=disagreement(classes) if classes else None,
        corrupted={
            kind: (
                float(np.mean([result.corrupted[kind] for result in results])),
                worst(result.corrupted[kind] for result in results),
            )
            for kind in results[0].corrupted
        },
    )


def _differs(task: Task, mean: float, spread: float, sampling: float | None, runs: int) -> bool:
    """Tell whether seeds differ by more than test examples explain, and so much that it counts."""
    if sampling is None or equal_quality_p_value(spread, sampling, runs) >= CHANCE:
        return False
    if isinstance(task.metric, str):
        return spread > NOTABLE * (1 - mean)
    return maximized(task) or spread > NOTABLE * abs(mean)


def _read_predictions(files: list[Path], kind: str) -> list[NDArray[Any]]:
    """Return what the runs kept of a kind; empty where they kept none."""
    found = []
    for file in files:
        with np.load(file) as arrays:
            found += [arrays[kind]] if kind in arrays else []
    return found


def _root_mean_square(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if len(known) == len(errors) else None
