"""Find the strategy that trains a model to a quality in the shortest time."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from penjing.core.backend import Backend, backend_for
from penjing.core.budget import parse_time
from penjing.core.budget import say as in_words
from penjing.core.errors import Exit, Refused
from penjing.core.extras import missing, need
from penjing.core.files import make_folder, write_json
from penjing.core.goal import Goal, parse_goal
from penjing.core.progress import Line, Say, silent
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.experiments.fit import (
    FitRecord,
    TrainingJob,
    check_goal,
    read_weights,
    refuse_framework,
    to_stderr,
    write_weights,
)
from penjing.experiments.tuned import (
    LEDGER,
    RECORD,
    REPORT,
    MachineProbe,
    RateRange,
    Timed,
    Tuned,
    TunedRun,
    TuneRecord,
)
from penjing.measurement.quality import maximized, metric_name, metric_value
from penjing.planners.halving import PlannedRun, RunResult, SearchSpace, check_optimizers, halving
from penjing.report.training import write_training_report
from penjing.run.ledger import Ledger
from penjing.train.machine import probe_machine
from penjing.train.objective import make_objective
from penjing.train.optimizers import OPTIMIZERS, OptimizerName
from penjing.train.range_test import run_range_test
from penjing.train.strategy import Strategy

DEFAULT_OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "adamw", "muon")
V = TypeVar("V", bound=Timed)

RANGE_STEPS = 60
RANGE_SHARE = 0.1
"""Range tests may take this share of the time; what is left out then trains at its default rate."""


def tune(
    model_factory: Callable[[], Model] | Model,
    task: Task,
    *,
    goal: str | Goal,
    time: str | float,
    out: Path | str,
    strategy: Strategy | None = None,
    optimizers: Sequence[OptimizerName] | None = None,
    first: int = 9,
    seed: int = 0,
    say: Say | None = None,
) -> Tuned:
    """Find the strategy with the shortest training time to a quality.

    A probe of the machine chooses precision and layout, range tests bound the learning rate of each
    optimizer, then short annealed runs over optimizer, schedule, rate, batch size, decay and averaging are
    halved (`penjing.planners.halving`). Every run that ended is kept in `out` and not made again.

    Args:
        model_factory: makes a model with fresh weights, the same for the same state of torch's generator;
            or a module, whose weights every run starts from.
        task: valid judges, test is looked at once, at the end.
        goal: for example `accuracy >= 92%`, of the task's metric.
        time: of the whole search, for example `20min`.
        out: folder of the search; an unfinished one is gone on with.
        strategy: gives all that is not searched for, batch size and augmentation for example.
        optimizers: by name; `sgd`, `adamw` and, where installed, `muon` by default.
        first: runs of the first round, at least 3.
        seed: of weights, order and proposals.
        say: gets lines of progress; by default they go to stderr.

    Raises:
        Refused: bad arguments, model or data, before anything slow; no run ended.

    >>> import tempfile
    >>> x = np.random.default_rng(0).standard_normal((400, 4)).astype(np.float32)
    >>> def make():
    ...     import torch
    ...     return torch.nn.Linear(4, 2)
    >>> task = Task(train=(x, (x[:, 0] > 0).astype(int)), batch_size=32)
    >>> fields = {"goal": "accuracy >= 80%", "time": "2s", "optimizers": ["sgd"]}
    >>> with tempfile.TemporaryDirectory() as out:
    ...     tuned = tune(make, task, **fields, out=out, say=silent)
    >>> tuned.strategy.optimizer
    'sgd'
    """
    need("tune", "tuning")
    search = _open(model_factory, task, goal, strategy or Strategy(), seed, say or to_stderr)
    seconds = parse_time(time, "time")
    if optimizers is None:
        optimizers = [name for name in DEFAULT_OPTIMIZERS if not missing(OPTIMIZERS[name].extra or "torch")]
    check_optimizers(optimizers)
    for name in optimizers:
        need(OPTIMIZERS[name].extra or "torch", f"the optimizer {name}")
    if first < 3:
        raise Refused(
            "must be at least 3",
            value=first,
            place="tune.first",
            fix="give first=9, the default",
            code=Exit.USAGE,
        )
    folder = make_folder(out)
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(folder / LEDGER))
        return _Tuning(search, folder, ledger).run(tuple(optimizers), seconds, first)


@dataclass(frozen=True)
class _Search:
    make: Callable[[], Model]
    backend: Backend
    task: Task
    goal: Goal
    base: Strategy
    seed: int
    say: Say
    key: str


def _open(
    factory: Callable[[], Model] | Model,
    task: Task,
    goal: str | Goal,
    base: Strategy,
    seed: int,
    say: Say,
) -> _Search:
    import torch

    if isinstance(factory, torch.nn.Module):
        given = factory

        def make() -> Model:
            return backend_for(given).copy(given)

    elif callable(factory):

        def make() -> Model:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return factory()

    else:
        raise Refused(
            "must be a torch module or a function that makes one",
            place="tune.model_factory",
            value=type(factory).__name__,
            fix="write tune(lambda: Net(), task, ...)",
            code=Exit.USAGE,
        )
    task, wanted, model = task.prepare(seed), parse_goal(goal), make()
    backend = backend_for(model)
    if backend.name != "torch":
        raise refuse_framework(backend, "tune.model_factory")
    check_goal(wanted, task)
    make_objective(task, base.label_smoothing)
    backend.check(backend.select(model, task.output), task.valid.example())
    base = base.with_batch_size(task)
    prints = [
        backend.fingerprint(model),
        task.train.fingerprint(),
        task.valid.fingerprint(),
        str(wanted),
        seed,
    ]
    key = hashlib.sha256(json.dumps(prints).encode()).hexdigest()
    return _Search(make, backend, task, wanted, base, seed, say, key)


class _Tuning:
    """One search: what it knows, and the runs that it makes."""

    def __init__(self, search: _Search, folder: Path, ledger: Ledger) -> None:
        self._search, self._folder, self._ledger = search, folder, ledger
        self._runs: list[TunedRun] = []
        self._events: list[str] = []
        self._best: tuple[float, float] | None = None

    def run(self, optimizers: tuple[OptimizerName, ...], seconds: float, first: int) -> Tuned:
        """Probe, test ranges, search, and write what was found."""
        start = time.perf_counter()
        probe = self._once("probe", MachineProbe, self._probe)
        self._say_event(Line.note(probe.why))
        ranges: dict[str, RateRange] = {}
        for name in optimizers:
            late = time.perf_counter() - start > RANGE_SHARE * seconds
            ranges[name] = self._once(f"range {name}", RateRange, partial(self._range, probe, name, late))
            self._say_event(Line.note(ranges[name].why))
        task = self._search.task
        space = SearchSpace(
            base=probe.strategy,
            rates={name: (ranges[name].lowest, ranges[name].highest) for name in optimizers},
            examples=len(task.train),
            smooths=task.loss == "cross_entropy",
            seconds=seconds - probe.spent_s - sum(each.spent_s for each in ranges.values()),
            first=first,
            up=maximized(task),
            seed=self._search.seed,
        )
        planner = halving(space, self._say_event)
        try:
            planned = next(planner)
            while True:
                planned = planner.send(self._carry_out(planned))
        except StopIteration:
            pass
        return self._finish(ranges, probe.seconds)

    def _once(self, name: str, kind: type[V], work: Callable[[], dict[str, Any]]) -> V:
        """Return what work gives, with its wall time; from the ledger where it was done before."""
        key = f"{self._search.key} {name}"
        found = self._ledger.get(key)
        if found is None:
            start = time.perf_counter()
            fields = work()
            made = kind(**fields, spent_s=time.perf_counter() - start)
            self._ledger.put(key, made.model_dump(mode="json"))
            return made
        return kind.model_validate(found)

    def _probe(self) -> dict[str, Any]:
        search = self._search
        objective = make_objective(search.task, search.base.label_smoothing)
        found = probe_machine(search.make(), search.backend, search.task.train, objective, search.base)
        listed = ", ".join(f"{name} {1e3 * each:.3g} ms" for name, each in found.seconds.items())
        chosen = found.strategy.model_copy(update={"compile": "auto"})
        why = f"a training step takes {listed}: {found.chosen}, {found.gain:.2f} times as fast as the first"
        return {"strategy": chosen, "seconds": found.seconds, "why": why}

    def _range(self, probe: MachineProbe, name: OptimizerName, late: bool) -> dict[str, Any]:
        search, own = self._search, OPTIMIZERS[name].lr
        around = {"lowest": own / 3, "highest": own * 3}
        if late:
            return around | {"why": f"{name}: no time for a range test; rates around {own:g} are tried"}
        strategy = probe.strategy.model_copy(update={"optimizer": name, "schedule": None})
        objective = make_objective(search.task, strategy.label_smoothing)
        try:
            found = run_range_test(
                search.make(),
                search.backend,
                search.task.train,
                objective,
                strategy,
                steps=RANGE_STEPS,
                seed=search.seed,
            )
        except Refused as refused:
            return around | {"why": f"{name}: {refused} Rates around {own:g} are tried"}
        why = (
            f"{name}: the loss falls fastest at rate {found.suggestion:.3g} and is smallest at "
            f"{found.highest:.3g}; rates between are tried"
        )
        return {
            "lowest": found.suggestion,
            "highest": max(found.highest, 1.5 * found.suggestion),
            "rates": found.rates,
            "losses": found.losses,
            "why": why,
        }

    def _carry_out(self, planned: PlannedRun) -> RunResult:
        """Make a run, or take it from the ledger."""
        text = json.dumps([planned.strategy.model_dump_json(), round(planned.seconds, 3)])
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        done = self._once(f"run {digest}", TunedRun, partial(self._train, planned, digest))
        self._runs.append(done)
        record = done.record
        if record is not None and self._leads(record):
            self._best = self._rank(record)
        self._say_event(Line.trial(_line(len(self._runs), done)))
        reached = None if record is None or record.reached is None else record.reached.seconds
        quality = None if record is None else record.quality
        return RunResult(quality=quality, reached_s=reached, spent_s=done.spent_s)

    def _train(self, planned: PlannedRun, digest: str) -> dict[str, Any]:
        """Train, and write the weights, before the ledger knows of the run, if it is the best so far."""
        search, limits = self._search, {"epochs": 10_000.0, "max_seconds": planned.seconds}
        model = search.make()
        strategy = planned.strategy.model_copy(update=limits)
        run = {
            "round": planned.round,
            "seconds": planned.seconds,
            "strategy": strategy,
            "weights": _weights_file(digest),
        }
        try:
            record = TrainingJob(model, search.task, strategy, search.goal, search.seed).run(silent)
        except Refused as refused:
            return run | {"refused": str(refused)}
        if self._leads(record):
            write_weights(model, self._folder / _weights_file(digest))
        return run | {"record": record}

    def _rank(self, record: FitRecord) -> tuple[float, float]:
        """Return what makes a run better than another: the time to the goal, then the quality."""
        quality = record.quality if maximized(self._search.task) else -record.quality
        return (-math.inf if record.reached is None else -record.reached.seconds), quality

    def _leads(self, record: FitRecord) -> bool:
        return self._best is None or self._rank(record) > self._best

    def _finish(self, ranges: dict[str, RateRange], probe: dict[str, float]) -> Tuned:
        search = self._search
        ranked = [(self._rank(run.record), i) for i, run in enumerate(self._runs) if run.record is not None]
        if not ranked:
            raise Refused(
                "at least one run must come to its end",
                value=self._runs[-1].refused,
                place="tune",
                fix="give more time, or another optimizer",
            )
        best = max(ranked, key=lambda pair: (pair[0], -pair[1]))[1]  # the first, whose weights were kept
        record = self._runs[best].record
        assert record is not None, "ranked runs have a record"
        strategy = record.strategy.model_copy(
            update={"epochs": record.epochs, "max_seconds": None, "compile": search.base.compile}
        )
        model = search.make()
        read_weights(model, self._folder / self._runs[best].weights)
        for other in self._runs:
            if other.weights != self._runs[best].weights:
                (self._folder / other.weights).unlink(missing_ok=True)
        done = TuneRecord(
            goal=search.goal,
            metric=metric_name(search.task),
            best=best,
            reached=record.reached is not None,
            strategy=strategy,
            seconds=record.seconds if record.reached is None else record.reached.seconds,
            quality=record.quality,
            test_quality=_test_quality(search, model),
            runs=tuple(self._runs),
            ranges=ranges,
            probe=probe,
            spent_s=sum(each.spent_s for each in (*self._runs, *ranges.values())),
            events=tuple(self._events),
        )
        write_json(self._folder / RECORD, done.model_dump(mode="json"))
        write_training_report(done.model_dump(mode="json"), self._folder / REPORT)
        return Tuned(strategy, model, done, self._folder)

    def _say_event(self, line: Line) -> None:
        self._events.append(str(line))
        self._search.say(line)


def _test_quality(search: _Search, model: Model) -> float:
    judged = search.backend.select(model, search.task.output)
    outputs = [search.backend.run(judged, inputs) for inputs, _ in search.task.test.batches(256)]
    return metric_value(search.task, np.concatenate(outputs), search.task.test.arrays()[1])


def _line(number: int, run: TunedRun) -> str:
    s = run.strategy
    words = (
        f"{s.optimizer} at {s.peak_lr:.3g}, {s.lr_schedule}, batch {s.batch_size}, decay {s.weight_decay:.2g}"
    )
    words += ", averaged" * (s.averaging != "none") + ", labels smoothed" * (s.label_smoothing > 0)
    head = f"run {number}, round {run.round}, {in_words(run.seconds, 's')}: {words}"
    if run.record is None:
        return f"{head}: {run.refused}"
    reached = run.record.reached
    tail = f", goal reached after {reached.seconds:.1f} s" if reached is not None else ""
    return f"{head}: {run.record.metric} {run.record.quality:.4g}{tail}"


def _weights_file(digest: str) -> str:
    return f"weights-{digest}.safetensors"
