"""The work that runs in a process of its own: survey the original, and build one candidate.

Both take the shared payload `(model, task)` and return plain data; what they write goes into a folder of
the run directory.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penjing.core.apply import apply
from penjing.core.artefact import deliver
from penjing.core.backend import Backend, GradientBackend, backend_for
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Stage, stage_of
from penjing.core.plan import plan_from_json, plan_to_json
from penjing.core.progress import Line, Say
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.measurement.nondeterminism import outputs_of, spread_of, twice
from penjing.measurement.process import factory_of
from penjing.measurement.quality_interval import quality_of
from penjing.planners.recovery import recovery
from penjing.processes.packing import pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from penjing.core.plan import Plan
    from penjing.core.value import Model

Shared = tuple[Any, Task]

CHECKED_EXAMPLES = 64
"""Examples on which the file's outputs are compared with those of the model in memory."""

STEP_EXAMPLES = 1024
"""Examples on which the quality after each step is taken, for the ablation."""

STRUCTURE = "structure"
"""Folder of a candidate's float model after the steps that change its shape, kept for the ablation."""

OTHER_RUNTIME = 3.0
"""How many times as far as two executions of integers those of two runtimes count as the same."""

PROBE_STEPS = 4
"""Training steps that the survey times to forecast an epoch."""


class Clock:
    """Adds up seconds by activity, on the monotonic clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def count(self, activity: str) -> Iterator[None]:
        """Count the time of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(activity, time.perf_counter() - start)

    def add(self, activity: str, seconds: float) -> None:
        """Add seconds to an activity."""
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds


def survey(shared: Shared, say: Say, target: Target, folder: Path, seed: int, hurry: bool) -> dict[str, Any]:
    """Check the original, write it as float artefacts for the target and for eager, and time training.

    `hurry` tells that time is limited, so that the faster training precision is worth a probe.

    Returns:
        facts: fingerprint, operations, layers, groups, seconds per epoch; `noise`, the relative difference
            of two evaluations; `spread` of the metric where there is any, and notes.
    """
    model, task = shared
    clock = Clock()
    backend = backend_for(model)
    example = task.valid.example()
    backend.check(model, example)
    say(Line.phase("exporting the original"))
    with clock.count("export"):
        (folder / "float").mkdir(parents=True, exist_ok=True)
        deliver(model, (), target.reference, folder / "float" / "target", example=example)
        eager = backend.name == "torch" and target.label != "torch eager"
        unsent = _cannot_be_sent(model) if eager else ""
        if eager and not unsent:
            deliver(
                model,
                (),
                Target("torch", threads=target.threads, batch=target.batch),
                folder / "float" / "eager",
                example=example,
            )
    layers = backend.layers(model)
    groups = backend.groups(model, example) if backend.name != "onnx" else None
    with clock.count("evaluation"):
        expected, noise = twice(backend, model, task, CHECKED_EXAMPLES, task.batch_size)
        spread, notes = spread_of(backend, model, task, STEP_EXAMPLES) if noise else (0.0, ())
    np.save(folder / "float" / "expected.npy", expected, allow_pickle=False)
    training = _training(model, backend, task, seed, clock, hurry)
    return {
        "backend": backend.name,
        "fingerprint": backend.fingerprint(model),
        "operations": backend.operations(model, example).model_dump(mode="json"),
        "outputs": int(expected.shape[-1]),
        "layers": [
            {"name": x.name, "kind": x.kind, "shapes": {k: list(v) for k, v in x.shapes.items()}}
            for x in layers
        ],
        "groups": []
        if groups is None
        else [{"name": g.name, "size": g.size, "layers": list(g.layers)} for g in groups.groups],
        "frozen": {} if groups is None else dict(groups.frozen),
        "blocks": list(backend.blocks(model, example)),
        "eager": eager and not unsent,
        "noise": noise,
        "spread": spread,
        "notes": [*notes, *filter(None, [unsent])],
        **training,
        "seconds": clock.seconds,
    }


def deliver_float(
    shared: Shared, say: Say, targets: dict[str, Target], folder: Path, seed: int
) -> dict[str, Any]:
    """Deliver the original, as it is, to other targets, each into the folder of its name.

    Returns:
        `refused`: by label, why a target cannot take the model; `seconds` by activity.
    """
    model, task = shared
    clock, refused = Clock(), {}
    example = task.valid.example()
    for name, target in targets.items():
        say(Line.phase(f"exporting the original for {target.label}"))
        with clock.count("export"):
            try:
                deliver(model, (), target, folder / name / "artefact", example=example)
            except Refused as refusal:
                refused[target.label] = str(refusal)
    return {"refused": refused, "seconds": clock.seconds}


def _cannot_be_sent(model: Model) -> str:
    """Return a note where the user's class cannot go to the process that would time it; else nothing."""
    try:
        pack(factory_of(model), "model").close()
    except Refused as refused:
        return f"PyTorch eager was not measured: {refused}"
    return ""


def _training(
    model: Model, backend: Backend, task: Task, seed: int, clock: Clock, hurry: bool
) -> dict[str, Any]:
    """Return the precision to train in and its seconds per epoch, both None where the backend does not train.

    With a limit on time the faster of two is taken, by a few steps in each; it must gain a quarter, for
    bfloat16 suffers most when other processes compete. Without one nothing is chosen by the clock: the same
    seed gives the same result.
    """
    if not isinstance(backend, GradientBackend):
        return {"precision": None, "epoch_seconds": None}
    choices = ("float32", "bfloat16") if hurry else ("float32",)
    with clock.count("training"):
        seconds = {p: _epoch_seconds(model, backend, task, seed, p) for p in choices}
    precision = "bfloat16" if seconds.get("bfloat16", math.inf) < 0.75 * seconds["float32"] else "float32"
    return {"precision": precision, "epoch_seconds": seconds[precision]}


def _epoch_seconds(model: Model, backend: Backend, task: Task, seed: int, precision: Any) -> float:
    """Return the seconds of an epoch, from a few steps.

    A first step warms the machine up; what any training costs besides its steps (opening the data, laying
    weights out) cancels between a short run and a longer one.
    """
    examples = len(task.train)

    def seconds(steps: int) -> float:
        share = min(1.0, steps * task.batch_size / examples)
        context = Context(task=task, backend=backend, original=model, seed=seed)
        applied = apply(model, recovery(share, precision), task, context=context)
        return float(applied.notes["training_s"])

    seconds(1)
    short, long = seconds(1), seconds(1 + PROBE_STEPS)
    steps = examples / task.batch_size
    return max(long - short, long / (1 + PROBE_STEPS) / 4) / PROBE_STEPS * steps


def build(
    shared: Shared, say: Say, plan_data: list[dict[str, Any]], target: Target, folder: Path, seed: int
) -> dict[str, Any]:
    """Apply a plan to a copy of the original and write the artefact into `folder/artefact`.

    Returns:
        changes, operations, noise, notes, the ablation's steps and the seconds by activity.
    """
    model, task = shared
    plan = plan_from_json(plan_data)
    example = task.valid.example()
    clock = Clock()
    steps: list[dict[str, Any]] = []
    start = time.perf_counter()

    def watch(index: int, backend: Backend, current: Model) -> None:
        with clock.count("evaluation"):
            steps.append(_step(plan, index, backend, current, task))
        shaped = any(stage_of(method) is Stage.STRUCTURE for method in plan[:index])
        if shaped and backend.name == "onnx" and not (folder / STRUCTURE).exists():
            with clock.count("export"):
                kept = current.proto if current.reference is None else current.reference
                deliver(type(current)(kept), plan[:index], target, folder / STRUCTURE, example=example)

    context = Context(task=task, backend=backend_for(model), original=model, seed=seed, say=say)
    applied = apply(model, plan, task, context=context, watch=watch)
    for activity in ("training", "export"):
        clock.add(activity, float(applied.notes.get(f"{activity}_s", 0.0)))
    clock.add("compression", time.perf_counter() - start - sum(clock.seconds.values()))
    final = backend_for(applied.model)
    with clock.count("export"):
        artefact = deliver(
            applied.model, plan, target, folder / "artefact", example=example, changes=applied.changes
        )
    with clock.count("evaluation"):
        batch = artefact.evaluation_batch(task.batch_size)
        expected, noise = twice(final, applied.model, task, CHECKED_EXAMPLES, batch)
        if final.name == "onnx" and target.runtime != "onnxruntime":
            noise = max(noise, _integer_noise(applied.model, task))
    np.save(folder / "expected.npy", expected, allow_pickle=False)
    return {
        "changes": [change.model_dump(mode="json") for change in applied.changes],
        "operations": final.operations(applied.model, example).model_dump(mode="json"),
        "steps": steps,
        "noise": noise,
        "notes": {k: v for k, v in applied.notes.items() if isinstance(v, str | int | float | list)},
        "seconds": clock.seconds,
    }


def _integer_noise(model: Model, task: Task) -> float:
    """Return what another runtime's integers may differ by: a few times what two executions here do."""
    from penjing.backends.onnx.integers.stated import measure_rounding_noise

    inputs = tuple(x[:CHECKED_EXAMPLES] for x in task.valid.arrays()[0])
    return OTHER_RUNTIME * measure_rounding_noise(model, inputs)


def _step(plan: Plan, index: int, backend: Backend, model: Model, task: Task) -> dict[str, Any]:
    targets = task.valid.arrays()[1][:STEP_EXAMPLES]
    outputs = outputs_of(backend, model, task, STEP_EXAMPLES, task.batch_size)
    return {
        "step": plan_to_json(plan)[index],
        "quality": quality_of(task, outputs, targets).model_dump(mode="json"),
        "operations": backend.operations(model, task.valid.example()).model_dump(mode="json"),
    }
