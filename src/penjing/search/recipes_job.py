"""The work of the probe of recipes that runs in a process of its own: write a file for each of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from penjing.core.apply import apply
from penjing.core.backend import Arrays, backend_for, backend_named
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import with_fields
from penjing.core.plan import Plan, plan_from_json
from penjing.core.progress import Line, Say
from penjing.core.target import Target, runtime_for
from penjing.core.value import Model
from penjing.repair.bias import CorrectBias
from penjing.search.build_job import Shared

EXAMPLES = 8
"""Training examples that ranges are taken from: no kernel's speed depends on where its range ends."""

NO_TIME = "there was no time for it"

_KINDS = ("conv", "depthwise", "linear")


def deliver_recipes(
    shared: Shared,
    say: Say,
    plans: dict[str, list[dict[str, Any]]],
    target: Target,
    folder: Path,
    seed: int,
    seconds: float,
    exported: Path,
) -> dict[str, Any]:
    """Write the original under one recipe after the other, as fast as can be: for timing and nothing else.

    The folders get no manifest, which would cost more than the rest for large files.

    Args:
        plans: by the names of the new folders.
        seconds: once they are over, after the export, no other recipe is begun.
        exported: the float model in ONNX, where such a file was written before.

    Returns:
        `layers`: how many with weights there are; by name `float`: those that stayed so, and `refused`: why
        there is no file; `seconds` by activity.
    """
    model, task = shared
    begun = time.perf_counter()
    example = task.valid.example()
    model = _in_onnx(model, exported, example)
    start = time.perf_counter()
    onnx = backend_named("onnx")
    names = [layer.name for layer in onnx.layers(model) if layer.kind in _KINDS]
    runtime = runtime_for(target)
    left: dict[str, list[str]] = {}
    refused: dict[str, str] = {}
    for name, data in plans.items():
        if time.perf_counter() - start > seconds:
            refused[name] = NO_TIME
            continue
        say(Line.step(f"writing {name}"))
        context = Context(task=task, backend=onnx, original=model, seed=seed)
        try:
            applied = apply(model, shorten_calibration(plan_from_json(data)), task, context=context)
            (folder / name).mkdir(parents=True)
            runtime.deliver(applied.model, example, folder / name)
        except Refused as refusal:
            refused[name] = str(refusal)
            continue
        done = {change.layer for change in applied.changes if change.done and _rounds(change.method)}
        left[name] = [layer for layer in names if layer not in done]
    spent = {"export": start - begun, "compression": time.perf_counter() - start}
    return {"layers": len(names), "float": left, "refused": refused, "seconds": spent}


def _in_onnx(model: Model, exported: Path, example: Arrays) -> Model:
    backend, onnx = backend_for(model), backend_named("onnx")
    if backend.name == "onnx":
        return model
    if not exported.is_file():
        return onnx.adopt(backend, model, example)  # type: ignore[attr-defined]
    from penjing.backends.onnx.model import load_onnx
    from penjing.backends.onnx.normalize import normalize

    return normalize(load_onnx(exported), example)


def shorten_calibration(plan: Plan) -> Plan:
    """Return a recipe that runs as fast but is made on few examples, without what only corrects errors."""
    kept = (method for method in plan if not isinstance(method, CorrectBias))
    return tuple(with_fields(method, examples=EXAMPLES, observer="minmax") for method in kept)


def _rounds(method: str) -> bool:
    return method != "SmoothActivations"
