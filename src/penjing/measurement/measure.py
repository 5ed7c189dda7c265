"""Measure delivered artefacts: quality, latency, memory and size, each in a process of its runtime."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from penjing.core.artefact import deliver, open_artefact
from penjing.core.backend import enter
from penjing.core.errors import Exit, Refused, nearest
from penjing.core.executor import Limits
from penjing.core.measurement import Measurement, Operations
from penjing.core.scratch import scratch
from penjing.core.target import Target
from penjing.core.task import Split, Task
from penjing.core.value import Model
from penjing.measurement.agreement import difference
from penjing.measurement.batch_dependence import outputs_in_memory
from penjing.measurement.process import factory_of, usual_limits
from penjing.measurement.quality import all_metrics, metric_name, metric_value, per_class_recall
from penjing.measurement.quality_interval import quality_of
from penjing.measurement.serving import Factory
from penjing.measurement.sittings import Effort
from penjing.measurement.stage import Entry, Stage


@dataclass(frozen=True)
class Measured:
    """A measurement, and the outputs that it is of, for paired tests.

    Attributes:
        outputs: `[examples, ...]`, in the batches that quality is judged in.
        usual: the outputs in batches of the task's size, to compare with the model in memory.
    """

    measurement: Measurement
    outputs: NDArray[Any]
    usual: NDArray[Any]


def measure(
    model_or_folder: Model | Path | str,
    task: Task,
    target: Target | None = None,
    split: str = "valid",
    factory: Factory | None = None,
    seconds: float = 10.0,
    limits: Limits | None = None,
) -> Measurement:
    """Measure one model or delivered folder on one split, alone (so without a latency ratio).

    A model is first delivered into a temporary folder: what is measured is always a file that was loaded
    back in a process of its own. Its outputs for the whole split are then compared with those of the model in
    memory, in the task's batches and, where outputs depend on the batch, in the target's: an export freezes
    branches that ask for the batch's size.

    Args:
        model_or_folder: a model of any backend that the target takes, or the folder of an artefact.
        task: data and metric.
        target: where to measure; by default the artefact's own, or ONNX Runtime.
        split: `train`, `valid` or `test`.
        factory: makes the user's class, for a folder in the runtime torch.
        seconds: for latency, the opening of fresh processes included; one sitting is made in any case.
        limits: of the process: seconds of a request, bytes; None for `usual_limits`.

    >>> measure("runs/net/artefact", task, split="test").latency.p50_ms.value  # doctest: +SKIP
    1.84

    Raises:
        Refused: the artefact cannot be delivered, loaded or run.
    """
    task = task.prepare()
    if isinstance(model_or_folder, str | Path):
        folder = Path(model_or_folder)
        entry = (folder, target or open_artefact(folder).target, factory)
        entries = {folder.name: entry}
        measured = measure_all(entries, task, split, folder.name, None, Effort(seconds), limits)
        return measured[folder.name].measurement
    model, name = model_or_folder, type(model_or_folder).__name__
    target = target or Target()
    backend, model, task = enter(model, task)
    example = task.valid.example()
    backend.check(model, example)
    with scratch() as parent:
        folder = deliver(model, target, parent / "artefact", example=example).path
        operations = {name: backend.operations(model, example)}
        entries = {name: (folder, target, factory or factory_of(model))}
        found = measure_all(entries, task, split, name, operations, Effort(seconds), limits)[name]
    data = _split(task, split)
    expected = outputs_in_memory(backend, model, data, task.batch_size, target.batch)
    apart = max(difference(found.outputs, expected.outputs), difference(found.usual, expected.usual))
    quality = metric_value(task, expected.usual, data.arrays()[1])
    return found.measurement.model_copy(update={"difference": apart, "quality_in_memory": quality})


def measure_all(
    candidates: Mapping[str, Entry],
    task: Task,
    split_name: str,
    reference: str,
    operations: Mapping[str, Operations | None] | None = None,
    effort: Effort = Effort(),  # noqa: B008  a frozen value
    limits: Limits | None = None,
) -> dict[str, Measured]:
    """Measure artefacts side by side, each in a process of its own, latency interleaved.

    An artefact that cannot be loaded or evaluated is refused; latency or memory that cannot be measured
    is a `NotMeasured` with the reason.

    Args:
        candidates: artefacts by name.
        task: data and metric.
        split_name: `train`, `valid` or `test`.
        reference: the candidate that latency ratios are taken with.
        operations: parameters and multiply-adds where they were counted.
        effort: seconds for latency, all candidates together, and what is known of the machine's noise.
        limits: of each process: seconds of a request, bytes; None for `usual_limits`.

    >>> entries = {"float": (a, Target(), None), "int8": (b, Target(), None)}  # doctest: +SKIP
    >>> measure_all(entries, task, "valid", "float")["int8"].measurement.latency.ratio.value  # doctest: +SKIP
    0.51

    Raises:
        Refused: the reference is no candidate, or an artefact is damaged, crashes, hangs or gives outputs
            that the metric cannot judge; the loss of the reference's process, where there are others, is a
            fault of the environment.
    """
    if reference not in candidates:
        raise Refused(
            "must be one of the candidates",
            value=reference,
            place="measure_all.reference",
            fix=nearest(reference, candidates),
            code=Exit.USAGE,
        )
    split = _split(task.prepare(), split_name)
    inputs, targets = split.arrays()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        stage = Stage(
            folder, inputs, task.batch_size, reference, limits or usual_limits(), alone=len(candidates) == 1
        )
        for name, entry in candidates.items():
            stage.judge(name, entry, stack)
        stage.time(effort)
    counts, measured = operations or {}, {}
    for name, entry in candidates.items():
        artefact, judged = open_artefact(entry[0]), stage.judged[name]
        found = _measurement(name, task, split_name, (targets, split.groups), stage)
        measured[name] = Measured(
            found.model_copy(
                update={
                    "operations": counts.get(name),
                    "size_bytes": artefact.size_bytes,
                    "compressed_bytes": artefact.compressed_bytes,
                }
            ),
            judged.outputs,
            judged.usual,
        )
    return measured


def _split(task: Task, name: str) -> Split:
    if name not in ("train", "valid", "test"):
        raise Refused(
            "must be train, valid or test",
            value=repr(name),
            place="split",
            fix="use valid while you search, and test once",
            code=Exit.USAGE,
        )
    split: Split = getattr(task, name)
    return split


def _measurement(
    name: str, task: Task, split_name: str, examples: tuple[NDArray[Any], NDArray[Any] | None], stage: Stage
) -> Measurement:
    judged, (targets, groups) = stage.judged[name], examples
    return Measurement(
        name=name,
        target=stage.entries[name][1].label,
        split=split_name,
        metric=metric_name(task),
        quality=quality_of(task, judged.outputs, targets, groups),
        metrics=all_metrics(judged.outputs, targets),
        per_class=per_class_recall(judged.outputs, targets, task.class_names),
        latency=stage.latency(name),
        memory_bytes=stage.memory[name],
        size_bytes=None,
        batches=judged.batches,
    )
