"""Train a model by a strategy, and keep the curve, the weights and what it cost."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from penjing.core.backend import Backend, backend_for
from penjing.core.config import refusal
from penjing.core.errors import Exit, Refused
from penjing.core.files import make_folder, read_json, refusing, write_bytes, write_json
from penjing.core.goal import Goal, parse_goal
from penjing.core.progress import Line, Say, silent
from penjing.core.task import Task
from penjing.core.value import Model, Value
from penjing.experiments.monitor import CurvePoint, Monitor
from penjing.measurement.energy import EnergyMeter
from penjing.measurement.quality import maximized, metric_name
from penjing.train.distributed import find_processes
from penjing.train.hooks import Hooks
from penjing.train.loop import fit as train
from penjing.train.objective import make_objective
from penjing.train.optimizers import OPTIMIZERS
from penjing.train.saved_state import SavedState
from penjing.train.strategy import Strategy

RECORD, WEIGHTS, STATE = "fit.json", "weights.safetensors", "training.safetensors"

BACKWARD = 3
"""Multiply-adds of a training step over those of the forward pass: as much again for each of the gradients
by inputs and by weights."""


class FitRecord(Value):
    """What a training run was and did.

    Attributes:
        strategy: as it ran, with the batch size.
        seed: of everything random.
        goal: where training was to end; None without.
        metric: that valid was judged by.
        curve: one evaluation on valid after each epoch.
        quality: of the model returned, on valid.
        reached: the evaluation that met the goal; None where none did.
        seconds: wall time of it all; `data_seconds` waiting for batches, `evaluation_seconds` evaluating.
        epochs: length of the schedule, shortened where `max_seconds` asked for it.
        steps, examples: taken and seen.
        samples_per_s: examples a second of computing.
        multiply_adds: of all steps, three times those of the forward passes (1 multiply-add = 2 FLOPs).
        peak_memory_bytes: largest resident memory of the process until the end, or of the GPU where it ran.
        energy_j: of the whole processor meanwhile; None: not measured, the machine does not tell.
        events: choices made and what was not planned.
    """

    strategy: Strategy
    seed: int
    goal: Goal | None
    metric: str
    curve: tuple[CurvePoint, ...]
    quality: float
    reached: CurvePoint | None
    seconds: float
    data_seconds: float
    evaluation_seconds: float
    epochs: float
    steps: int
    examples: int
    samples_per_s: float
    multiply_adds: int
    peak_memory_bytes: int
    energy_j: float | None
    events: tuple[str, ...]


class Fitted:
    """A trained model with its record, as `pj.fit` returns it.

    Attributes:
        model: a trained copy of the model that was given.
        record: what training did.
        folder: where both were saved; None without `out`.
    """

    def __init__(self, model: Model, record: FitRecord, folder: Path | None) -> None:
        self.model, self.record, self.folder = model, record, folder

    def __repr__(self) -> str:
        return f"Fitted({self.record.metric} {self.record.quality:.4g}, {self.record.seconds:.1f} s)"


@dataclass(frozen=True)
class TrainingJob:
    """One training run on a model that may be changed.

    Attributes:
        model: trained in place.
        task: prepared.
        strategy: with its batch size.
        goal: where training ends.
        seed: of everything random.
    """

    model: Model
    task: Task
    strategy: Strategy
    goal: Goal | None
    seed: int

    def run(self, say: Say, state: tuple[Path, str] | None = None) -> FitRecord:
        """Train, and measure what it cost.

        Args:
            say: gets a line an epoch.
            state: file and key of the state on the way; None: not kept.

        Raises:
            Refused: as `penjing.train.loop.fit`.
        """
        task, backend = self.task, backend_for(self.model)
        judged = backend.select(self.model, task.output)
        monitor = Monitor(judged, backend, task, self.strategy, self.goal, say)
        saved = None if state is None else SavedState(*state, also=monitor, processes=find_processes())
        energy = EnergyMeter()
        done = train(
            self.model,
            task.train,
            make_objective(task, self.strategy.label_smoothing),
            self.strategy,
            seed=self.seed,
            hooks=Hooks(evaluate=monitor),
            saved_state=saved,
        )
        monitor.restore_best()
        averaged = self.strategy.averaging != "none" or OPTIMIZERS[self.strategy.optimizer].modes
        quality, reached = monitor.measure(done.steps, averaged), monitor.reached
        if self.goal is not None and reached is None and self.goal.met(quality):  # by its new statistics
            last = monitor.points[-1].model_dump()
            reached = CurvePoint(**last | {"quality": quality, "seconds": done.seconds - done.hook_seconds})
        operations = backend.operations(judged, task.valid.example())
        return FitRecord(
            strategy=self.strategy,
            seed=self.seed,
            goal=self.goal,
            metric=metric_name(task),
            curve=tuple(monitor.points),
            quality=quality,
            reached=reached,
            seconds=done.seconds,
            data_seconds=done.data_seconds,
            evaluation_seconds=done.hook_seconds,
            epochs=done.planned_epochs,
            steps=done.steps,
            examples=done.examples,
            samples_per_s=done.samples_per_s,
            multiply_adds=BACKWARD * operations.multiply_adds * done.examples,
            peak_memory_bytes=_peak_memory(self.model),
            energy_j=energy.joules(),
            events=done.events,
        )


def fit(
    model: Model,
    task: Task,
    strategy: Strategy | None = None,
    *,
    goal: str | Goal | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    say: Say | None = None,
) -> Fitted:
    """Train a copy of a torch module on a task.

    The same seed, model, data and strategy give the same weights, also where the run was killed on the way
    and called again with the same `out`. Data that augment by random numbers of their own are the exception.

    Args:
        model: a `torch.nn.Module`; never changed.
        task: data, loss and metric; valid judges once an epoch, test is not looked at.
        strategy: `Strategy()` by default.
        goal: for example `accuracy >= 92%`, of the task's metric; training ends when valid meets it.
        seed: of order, dropout and augmentation (weights are the model's).
        out: folder for the record, the weights and, on the way, the state; a finished one is read back.
        say: gets a line an epoch; by default they go to stderr.

    Raises:
        Refused: bad data, model or strategy, a goal of another metric, or `out` of another run; the loss
            diverges twice, or memory lacks.

    >>> import numpy as np, torch
    >>> x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    >>> model = torch.nn.Linear(4, 2)
    >>> fitted = fit(model, Task(train=(x, (x[:, 0] > 0).astype(int))), Strategy(epochs=20), say=silent)
    >>> fitted.record.metric, fitted.record.quality > 0.8
    ('accuracy', True)
    """
    strategy, wanted = strategy or Strategy(), None if goal is None else parse_goal(goal)
    if not isinstance(strategy, Strategy):
        raise Refused(
            "must be a penjing.Strategy",
            value=repr(strategy)[:80],
            place="strategy",
            fix="write strategy=Strategy(epochs=10)",
            code=Exit.USAGE,
        )
    task, backend = task.prepare(seed), backend_for(model)
    if backend.name != "torch":
        raise refuse_framework(backend)
    make_objective(task, strategy.label_smoothing)
    check_goal(wanted, task)
    judged = backend.select(model, task.output)
    backend.check(judged, task.valid.example())
    strategy = strategy.with_batch_size(task)
    folder = None if out is None else Path(out).expanduser().absolute()
    key = "" if folder is None else _key(backend, model, task, strategy, wanted, seed)
    copy = backend.copy(model)
    if folder is not None and (before := _finished(folder, key)) is not None:
        read_weights(copy, folder / WEIGHTS)
        return Fitted(copy, before, folder)
    job = TrainingJob(copy, task, strategy, wanted, seed)
    is_main = find_processes().is_main
    say = (say or to_stderr) if is_main else silent
    record = job.run(say, None if folder is None else (make_folder(folder) / STATE, key))
    if folder is not None and is_main:
        _save(copy, record, folder, key)
    return Fitted(copy, record, folder)


def refuse_framework(backend: Backend, place: str = "model") -> Refused:
    """Return the refusal of a model that does not train here."""
    return Refused(
        "must be a torch.nn.Module",
        value=f"a model of {backend.name}",
        place=place,
        fix="train in torch, then export",
    )


def check_goal(goal: Goal | None, task: Task) -> None:
    """Refuse a goal that the task does not judge by.

    Raises:
        Refused: another metric, or the wrong direction.
    """
    if goal is None:
        return
    name, up = metric_name(task), maximized(task)
    side, direction = ("a lower", "maximized") if up else ("an upper", "minimized")
    if goal.metric != name:
        raise Refused(
            "must be of the task's metric",
            value=goal.metric,
            place="goal",
            fix=f"write {name}, or give the task this metric",
            code=Exit.USAGE,
        )
    if goal.at_least != up:
        raise Refused(
            f"must be {side} bound of {name}, which is {direction}",
            value=str(goal),
            place="goal",
            fix=f"write {name} {'>=' if up else '<='} {goal.value:g}",
            code=Exit.USAGE,
        )


def _key(backend: Backend, model: Model, task: Task, strategy: Strategy, goal: Goal | None, seed: int) -> str:
    asked = [
        backend.fingerprint(model),
        task.train.fingerprint(),
        task.valid.fingerprint(),
        strategy.model_dump_json(),
        str(goal),
        seed,
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _finished(folder: Path, key: str) -> FitRecord | None:
    """Return the record of the same run where it is finished.

    Raises:
        Refused: the folder holds another finished run, or a damaged one.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("key") != key:
        raise Refused(
            "must hold the same training run or none",
            value="another model, data, strategy, goal or seed",
            place=str(folder),
            fix="give another folder",
            code=Exit.USAGE,
        )
    try:
        return FitRecord.model_validate(content.get("record"))
    except ValidationError as error:
        raise refusal(error, str(path), FitRecord) from error


def _save(model: Model, record: FitRecord, folder: Path, key: str) -> None:
    """Write the weights, then the record, whose presence says that all is there; the state goes."""
    write_weights(model, folder / WEIGHTS)
    write_json(folder / RECORD, {"key": key, "record": record.model_dump(mode="json")})
    (folder / STATE).unlink(missing_ok=True)


def write_weights(model: Model, path: Path) -> None:
    """Write all tensors of a torch module as safetensors, whole or not at all.

    Raises:
        Refused: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    write_bytes(path, save(tensors))


def read_weights(model: Model, path: Path) -> None:
    """Put saved tensors into a module of the same structure.

    Raises:
        Refused: the file is missing or damaged, or is another model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with refusing(path, "read"):
            model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise Refused(
            "must be complete and of the same model",
            value=str(error)[:80],
            place=str(path),
            fix="delete the folder: training begins anew",
            code=Exit.ENVIRONMENT,
        ) from error


def _peak_memory(model: Model) -> int:
    import torch

    if any(p.device.type == "cuda" for p in model.parameters()):
        return int(torch.cuda.max_memory_allocated())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def to_stderr(line: Line) -> None:
    """Write a line of progress."""
    sys.stderr.write(f"{line}\n")
