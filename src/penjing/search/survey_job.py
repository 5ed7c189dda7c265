"""The survey of the original, in a process of its own: its facts, its float files, the pace of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from penjing.core.apply import apply
from penjing.core.artefact import deliver
from penjing.core.backend import Arrays, Backend, GradientBackend, backend_for
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.progress import Line, Say
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.measurement.nondeterminism import spread_of, twice
from penjing.measurement.process import factory_of
from penjing.planners.recovery import plan_recovery
from penjing.processes.packing import pack
from penjing.search.build_job import CHECKED_EXAMPLES, STEP_EXAMPLES, Shared
from penjing.search.clock import Clock
from penjing.search.expected import write_expected
from penjing.search.values import GroupFacts, LayerFacts, Precision, Survey

PROBE_STEPS = 4
"""Training steps that the survey times to forecast an epoch."""


def survey(
    shared: Shared, say: Say, target: Target, folder: Path, seed: int, probe_precisions: bool
) -> dict[str, Any]:
    """Check the original, write it as float artefacts for the target and for eager, and time training.

    `probe_precisions` asks whether training is faster in bfloat16, which is worth a probe where the time is
    limited.

    Returns:
        a `Survey` as plain data.
    """
    model, task = shared
    clock = Clock()
    backend = backend_for(model)
    example = task.valid.example()
    backend.check(model, example)
    say(Line.phase("exporting the original"))
    eager = backend.name == "torch" and target.label != "torch eager"
    unsent = _cannot_be_sent(model) if eager else ""
    with clock.count("export"):
        _deliver_originals(model, example, target, folder / "float", eager and not unsent)
    groups = backend.groups(model, example) if backend.name != "onnx" else None
    with clock.count("evaluation"):
        expected, noise = twice(backend, model, task, CHECKED_EXAMPLES, task.batch_size)
        spread, notes = spread_of(backend, model, task, STEP_EXAMPLES) if noise else (0.0, ())
    write_expected(folder / "float", expected)
    precision, epoch_seconds = _pace(model, backend, task, seed, clock, probe_precisions)
    return Survey(
        backend=backend.name,
        fingerprint=backend.fingerprint(model),
        operations=backend.operations(model, example),
        outputs=int(expected.shape[-1]),
        layers=tuple(
            LayerFacts(name=x.name, kind=x.kind, shapes=dict(x.shapes)) for x in backend.layers(model)
        ),
        groups=()
        if groups is None
        else tuple(GroupFacts(name=g.name, size=g.size, layers=g.layers) for g in groups.groups),
        frozen={} if groups is None else dict(groups.frozen),
        blocks=tuple(backend.blocks(model, example)),
        eager=eager and not unsent,
        noise=noise,
        spread=spread,
        notes=(*notes, *filter(None, [unsent])),
        precision=precision,
        epoch_seconds=epoch_seconds,
        seconds=clock.seconds,
    ).model_dump(mode="json")


def _deliver_originals(model: Model, example: Arrays, target: Target, folder: Path, eager: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    deliver(model, target.reference, folder / "target", example=example)
    if eager:
        torch_eager = Target("torch", threads=target.threads, batch=target.batch)
        deliver(model, torch_eager, folder / "eager", example=example)


def _cannot_be_sent(model: Model) -> str:
    """Return a note where the user's class cannot go to the process that would time it; else nothing."""
    try:
        pack(factory_of(model), "model").close()
    except Refused as refused:
        return f"PyTorch eager was not measured: {refused}"
    return ""


def _pace(
    model: Model, backend: Backend, task: Task, seed: int, clock: Clock, probe_precisions: bool
) -> tuple[Precision | None, float | None]:
    """Return the precision to train in and its seconds per epoch, both None where the backend does not train.

    With a limit on time the faster of two is taken, by a few steps in each; it must gain a quarter, for
    bfloat16 suffers most when other processes compete. Without one nothing is chosen by the clock: the same
    seed gives the same result.
    """
    if not isinstance(backend, GradientBackend):
        return None, None
    choices: tuple[Precision, ...] = ("float32", "bfloat16") if probe_precisions else ("float32",)
    with clock.count("training"):
        seconds = {p: _epoch_seconds(model, backend, task, seed, p) for p in choices}
    gains = seconds.get("bfloat16", math.inf) < 0.75 * seconds["float32"]
    precision: Precision = "bfloat16" if gains else "float32"
    return precision, seconds[precision]


def _epoch_seconds(model: Model, backend: Backend, task: Task, seed: int, precision: Precision) -> float:
    """Return the seconds of an epoch, from a few steps.

    A first step warms the machine up; what any training costs besides its steps (opening the data, laying
    weights out) cancels between a short run and a longer one.
    """
    examples = len(task.train)

    def seconds(steps: int) -> float:
        share = min(1.0, steps * task.batch_size / examples)
        context = Context(task=task, backend=backend, original=model, seed=seed)
        applied = apply(model, plan_recovery(share, precision), task, context=context)
        return float(applied.notes["training_s"])

    seconds(1)
    short, long = seconds(1), seconds(1 + PROBE_STEPS)
    steps = examples / task.batch_size
    return max(long - short, long / (1 + PROBE_STEPS) / 4) / PROBE_STEPS * steps
