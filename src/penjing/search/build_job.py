"""The work that builds one candidate, in a process of its own.

Every job takes the shared payload `(model, task)` and returns plain data; what it writes goes into a folder
of the run directory.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.core.apply import Applied, apply
from penjing.core.artefact import deliver
from penjing.core.backend import Backend, backend_for
from penjing.core.context import Context
from penjing.core.method import Stage, stage_of
from penjing.core.plan import plan_from_json, plan_to_json
from penjing.core.progress import Say
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.trial import StepQuality
from penjing.measurement.nondeterminism import outputs_of, twice
from penjing.measurement.quality_interval import quality_of
from penjing.search.clock import Clock
from penjing.search.expected import write_expected
from penjing.search.values import Built

if TYPE_CHECKING:
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


def build(
    shared: Shared, say: Say, plan_data: list[dict[str, Any]], target: Target, folder: Path, seed: int
) -> dict[str, Any]:
    """Apply a plan to a copy of the original and write the artefact into `folder/artefact`.

    Returns:
        a `Built` as plain data.
    """
    model, task = shared
    plan = plan_from_json(plan_data)
    example = task.valid.example()
    clock = Clock()
    steps: list[StepQuality] = []
    start = time.perf_counter()

    def watch(index: int, backend: Backend, current: Model) -> None:
        with clock.count("evaluation"):
            steps.append(_step(plan, index, backend, current, task))
        shaped = any(stage_of(method) is Stage.STRUCTURE for method in plan[:index])
        if shaped and backend.name == "onnx" and not (folder / STRUCTURE).exists():
            with clock.count("export"):
                kept = current.proto if current.reference is None else current.reference
                shaped_model = Applied(type(current)(kept), (), plan[:index])
                deliver(shaped_model, target, folder / STRUCTURE, example=example)

    context = Context(task=task, backend=backend_for(model), original=model, seed=seed, say=say)
    applied = apply(model, plan, task, context=context, watch=watch)
    for activity in ("training", "export"):
        clock.add(activity, float(applied.notes.get(f"{activity}_s", 0.0)))
    clock.add("compression", time.perf_counter() - start - sum(clock.seconds.values()))
    final = backend_for(applied.model)
    with clock.count("export"):
        artefact = deliver(applied, target, folder / "artefact", example=example)
    with clock.count("evaluation"):
        batch = artefact.evaluation_batch(task.batch_size)
        expected, noise = twice(final, applied.model, task, CHECKED_EXAMPLES, batch)
        if final.name == "onnx" and target.runtime != "onnxruntime":
            noise = max(noise, _integer_noise(applied.model, task))
    write_expected(folder, expected)
    return Built(
        changes=tuple(applied.changes),
        operations=final.operations(applied.model, example),
        steps=tuple(steps),
        noise=noise,
        notes={k: v for k, v in applied.notes.items() if isinstance(v, str | int | float | list)},
        seconds=clock.seconds,
    ).model_dump(mode="json")


def _integer_noise(model: Model, task: Task) -> float:
    """Return what another runtime's integers may differ by: a few times what two executions here do."""
    from penjing.backends.onnx.integers.stated import measure_rounding_noise

    inputs = tuple(x[:CHECKED_EXAMPLES] for x in task.valid.arrays()[0])
    return OTHER_RUNTIME * measure_rounding_noise(model, inputs)


def _step(plan: Plan, index: int, backend: Backend, model: Model, task: Task) -> StepQuality:
    targets = task.valid.arrays()[1][:STEP_EXAMPLES]
    outputs = outputs_of(backend, model, task, STEP_EXAMPLES, task.batch_size)
    return StepQuality(
        step=plan_to_json(plan)[index],
        quality=quality_of(task, outputs, targets),
        operations=backend.operations(model, task.valid.example()),
    )
