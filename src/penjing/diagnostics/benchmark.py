"""Measure an original in every runtime there is, and artefacts beside it, in one interleaved run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penjing.core.artefact import deliver, open_artefact
from penjing.core.backend import enter
from penjing.core.extras import missing
from penjing.core.measurement import Measurement
from penjing.core.scratch import scratch
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.value import Model
from penjing.measurement.measure import measure_all
from penjing.measurement.process import factory_of
from penjing.search.runtimes import list_openvino_modes


def benchmark(
    model: Model,
    task: Task,
    artefacts: Sequence[Path] = (),
    *,
    threads: int = 1,
    batch: int = 1,
    split: str = "valid",
) -> dict[str, Any]:
    """Return a measurement for the float model in each usable runtime and for each artefact.

    Artefacts run with their own target. Latency ratios are to the float model in ONNX Runtime, or in
    PyTorch eager where that is missing.

    Raises:
        Refused: the model cannot be exported, or an artefact is damaged.
    """
    task = task.prepare()
    backend, model, task = enter(model, task)
    example = task.valid.example()
    backend.check(model, example)
    factory = factory_of(model)
    with scratch() as temporary:
        entries: dict[str, Any] = {}
        for target in _targets(backend.name, threads, batch):
            folder = temporary / target.label.replace(" ", "-")
            deliver(model, target, folder, example=example)
            entries[f"float, {target.label}"] = (folder, target, factory)
        counts = dict.fromkeys(entries, backend.operations(model, example))
        for path in artefacts:
            artefact = open_artefact(path)
            entries[str(path)] = (artefact.path, artefact.target, factory)
        found = measure_all(entries, task, split, next(iter(entries)), counts)
    measurements: dict[str, Measurement] = {name: measured.measurement for name, measured in found.items()}
    return {
        "split": split,
        "reference": next(iter(entries)),
        "rows": {name: m.model_dump(mode="json") for name, m in measurements.items()},
    }


def _targets(backend: str, threads: int, batch: int) -> list[Target]:
    common = {"threads": threads, "batch": batch}
    targets = [] if missing("onnx") else [Target("onnxruntime", **common)]
    targets += [Target("openvino", mode=mode, **common) for mode in list_openvino_modes()]
    if backend == "torch":
        targets += [Target("torch", mode=mode, **common) for mode in ("eager", "compiled")]
    return targets
