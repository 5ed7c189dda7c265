"""Measure delivered artefacts: quality, latency, memory and size, each in a process of its runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.artefact import deliver, open_artefact
from penjing.core.backend import Arrays, enter
from penjing.core.errors import Exit, Refused, nearest
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured, Operations
from penjing.core.target import Target
from penjing.core.task import Split, Task
from penjing.core.value import Model
from penjing.measurement.latency import Samples, interleave, summarise
from penjing.measurement.process import RuntimeProcess, factory_of, save_arrays
from penjing.measurement.quality import all_metrics, metric_name, per_class_recall
from penjing.measurement.quality_interval import quality_of
from penjing.measurement.serving import Factory

Entry = tuple[Path, Target, Factory | None]
"""A delivered folder, where it runs, and what makes the user's class where the runtime needs it."""

COMPARED_EXAMPLES = 64
_WARM_CALLS = 3


@dataclass(frozen=True)
class Measured:
    """A measurement and the outputs `[examples, ...]` that its quality is of, for paired tests."""

    measurement: Measurement
    outputs: NDArray[Any]


def measure(
    model_or_folder: Model | Path | str,
    task: Task,
    target: Target | None = None,
    split: str = "valid",
    factory: Factory | None = None,
) -> Measurement:
    """Measure one model or delivered folder on one split, alone (so without a latency ratio).

    A model is first delivered into a temporary folder: what is measured is always a file that was loaded
    back in a process of its own; its outputs are then compared with those of the model in memory.

    Args:
        model_or_folder: a model of any backend that the target takes, or the folder of an artefact.
        task: data and metric.
        target: where to measure; by default the artefact's own, or ONNX Runtime.
        split: `train`, `valid` or `test`.
        factory: makes the user's class, for a folder in the runtime torch.

    >>> measure("runs/net/artefact", task, split="test").latency.p50_ms.value  # doctest: +SKIP
    1.84

    Raises:
        Refused: the artefact cannot be delivered, loaded or run.
    """
    task = task.prepare()
    if isinstance(model_or_folder, str | Path):
        folder = Path(model_or_folder)
        entry = (folder, target or open_artefact(folder).target, factory)
        return measure_all({folder.name: entry}, task, split, folder.name)[folder.name].measurement
    model, name = model_or_folder, type(model_or_folder).__name__
    target = target or Target()
    backend, model, task = enter(model, task)
    example = task.valid.example()
    backend.check(model, example)
    with tempfile.TemporaryDirectory(prefix="penjing-") as parent:
        folder = deliver(model, (), target, Path(parent) / "artefact", example=example).path
        operations = {name: backend.operations(model, example)}
        entries = {name: (folder, target, factory or factory_of(model))}
        found = measure_all(entries, task, split, name, operations)[name]
    inputs = tuple(x[:COMPARED_EXAMPLES] for x in _split(task, split).arrays()[0])
    apart = difference(found.outputs[:COMPARED_EXAMPLES], backend.run(model, inputs))
    return found.measurement.model_copy(update={"difference": apart})


def measure_all(
    candidates: Mapping[str, Entry],
    task: Task,
    split_name: str,
    reference: str,
    operations: Mapping[str, Operations | None] | None = None,
    seconds: float = 10.0,
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
        seconds: for the rounds of latency, all candidates together.

    >>> entries = {"float": (a, Target(), None), "int8": (b, Target(), None)}  # doctest: +SKIP
    >>> measure_all(entries, task, "valid", "float")["int8"].measurement.latency.ratio.value  # doctest: +SKIP
    0.51

    Raises:
        Refused: the reference is no candidate, or an artefact is damaged, crashes, hangs or gives outputs
            that the metric cannot judge.
    """
    if reference not in candidates:
        raise Refused(
            "must be one of the candidates",
            value=reference,
            place="measure_all.reference",
            fix=nearest(reference, candidates),
            code=Exit.USAGE,
        )
    inputs, targets = _split(task.prepare(), split_name).arrays()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        stage = _Stage(folder, inputs, save_arrays(folder, inputs, "inputs"), task.batch_size)
        for name, entry in candidates.items():
            stage.admit(name, entry, stack)
        stage.samples = interleave(
            {name: p for name, p in stage.processes.items() if name not in stage.failures},
            seconds=seconds,
            on_failure=stage.fail,
        )
    counts, measured = operations or {}, {}
    for name, entry in candidates.items():
        artefact, result = open_artefact(entry[0]), stage.result(name, entry[1], reference)
        files = {"size_bytes": artefact.size_bytes, "compressed_bytes": artefact.compressed_bytes}
        found = _measurement(name, task, split_name, targets, result)
        found = found.model_copy(update={"operations": counts.get(name), **files})
        measured[name] = Measured(found, stage.outputs[name])
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


def difference(outputs: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return max|outputs - expected| / max|expected|; the absolute difference where `expected` is zero.

    >>> difference(np.array([1.0, 3.9]), np.array([1.0, 4.0]))
    0.025000000000000022

    Raises:
        Refused: the shapes differ, or a value is NaN or infinite.
    """
    if outputs.shape != expected.shape:
        raise Refused(
            f"the file's outputs must have the shape of the model's, {expected.shape}",
            value=outputs.shape,
            place="outputs",
            fix="export the model again; if it happens again, the runtime cannot carry this model",
        )
    a, b = np.asarray(outputs, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise Refused(
            "must be finite",
            value="NaN or infinity",
            place="outputs",
            fix="look for a division by zero or an overflow, in float16 above all",
        )
    if a.size == 0:
        return 0.0
    scale = float(np.abs(b).max())
    return float(np.abs(a - b).max()) / (scale or 1.0)


@dataclass
class _Result:
    target: Target
    outputs: NDArray[Any]
    latency: Latency | NotMeasured
    memory: Estimate | NotMeasured


@dataclass
class _Stage:
    """The processes of one comparison and what they gave so far."""

    folder: Path
    inputs: Arrays
    files: tuple[Path, ...]
    batch: int
    processes: dict[str, RuntimeProcess] = field(default_factory=dict)
    outputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    memory: dict[str, Estimate | NotMeasured] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)

    def admit(self, name: str, entry: Entry, stack: ExitStack) -> None:
        """Start a process, take its peak memory on the target's batch, then all outputs."""
        folder, target, factory = entry
        process = stack.enter_context(RuntimeProcess(folder, target, model=factory))
        number = len(self.processes)
        process.set_batch(save_arrays(self.folder, timed_batch(self.inputs, target), f"batch{number}"))
        try:
            process.time(_WARM_CALLS)
            self.memory[name] = _peak(process)
        except Refused as refusal:
            if not process.alive:
                raise
            self.fail(name, refusal)
        batch = open_artefact(folder).evaluation_batch(self.batch)
        self.outputs[name] = process.outputs(self.files, batch, self.folder / f"outputs{number}.npy")
        self.processes[name] = process

    def fail(self, name: str, refusal: Refused) -> None:
        self.failures[name] = str(refusal)

    def result(self, name: str, target: Target, reference: str) -> _Result:
        absent = NotMeasured(reason=self.failures.get(name, "no rounds were run"))
        return _Result(
            target,
            self.outputs[name],
            self._latency(name, target, reference) or absent,
            self.memory.get(name, absent),
        )

    def _latency(self, name: str, target: Target, reference: str) -> Latency | None:
        mine, other = self.samples.get(name), self.samples.get(reference)
        if mine is None:
            return None
        if name == reference or other is None:
            return summarise(mine, None, target.batch, target.threads)
        return summarise(mine, other, target.batch, target.threads, reference)


def timed_batch(inputs: Arrays, target: Target) -> Arrays:
    """Return the batch that is timed: the first `target.batch` examples, repeated where there are fewer.

    Where the target's input shapes are not the data's, numbers of these shapes are drawn (zeros for
    integers, which every table of embeddings holds).

    >>> timed_batch((np.eye(3),), Target(batch=5))[0].argmax(1)
    array([0, 1, 2, 0, 1])

    Raises:
        Refused: the target has another number of shapes than the data has inputs.
    """
    shapes = target.input_shapes
    if shapes is not None and len(shapes) != len(inputs):
        raise Refused(
            "must have one shape for each input",
            value=f"{len(shapes)} for {len(inputs)}",
            place="target.input_shapes",
            fix="give the shapes in the order of the inputs, without the batch",
            code=Exit.USAGE,
        )
    rng = np.random.default_rng(0)
    batch = []
    for i, array in enumerate(inputs):
        if shapes is None or shapes[i] == array.shape[1:]:
            batch.append(array[np.arange(target.batch) % len(array)])
        elif np.issubdtype(array.dtype, np.floating):
            batch.append(rng.standard_normal((target.batch, *shapes[i])).astype(array.dtype))
        else:
            batch.append(np.zeros((target.batch, *shapes[i]), dtype=array.dtype))
    return tuple(batch)


def _peak(process: RuntimeProcess) -> Estimate | NotMeasured:
    peak, before = process.peak_memory_bytes(), process.rss_before_bytes
    if peak is None:
        return NotMeasured(reason="the system keeps no peak of a process's memory")
    how = f"peak resident memory of the process, of which {before} before loading the artefact"
    return Estimate(value=peak, low=peak, high=peak, n=1, unit="bytes", how=how)


def _measurement(
    name: str, task: Task, split_name: str, targets: NDArray[Any], result: _Result
) -> Measurement:
    return Measurement(
        name=name,
        target=result.target.label,
        split=split_name,
        metric=metric_name(task),
        quality=quality_of(task, result.outputs, targets),
        metrics=all_metrics(result.outputs, targets),
        per_class=per_class_recall(result.outputs, targets, task.class_names),
        latency=result.latency,
        memory_bytes=result.memory,
        size_bytes=None,
    )
