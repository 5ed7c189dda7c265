"""Describe a model without changing or running a search on it."""

from __future__ import annotations

from typing import Any

from penjing.core.backend import Arrays, Backend, Groups, enter
from penjing.core.errors import Refused
from penjing.core.registry import backends_of, load_methods
from penjing.core.task import Task
from penjing.core.value import Model


def inspect_model(model: Model, task: Task) -> dict[str, Any]:
    """Return layers with shapes, the group whose channels each makes, what is frozen and why, and counts.

    Raises:
        Refused: what `check` of the backend refuses.
    """
    task = task.prepare()
    backend, model, task = enter(model, task)
    example = task.valid.example()
    backend.check(model, example)
    groups, whole = _groups(backend, model, example)
    made_by = {
        slot.layer: group.name for group in groups.groups for slot in group.slots if slot.role == "out"
    }
    operations = backend.operations(model, example)
    onnx = list_methods("onnx")
    return {
        "backend": backend.name,
        "fingerprint": backend.fingerprint(model),
        "parameters": operations.parameters,
        "multiply_adds": operations.multiply_adds,
        "uncounted": list(operations.uncounted),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shapes": {k: list(v) for k, v in layer.shapes.items()},
                "group": made_by.get(layer.name, ""),
                "frozen": groups.frozen.get(layer.name, ""),
            }
            for layer in backend.layers(model)
        ],
        "whole": whole,
        "groups": [{"name": g.name, "size": g.size, "layers": list(g.layers)} for g in groups.groups],
        "methods": sorted(list_methods(backend.name) | onnx),
    }


def _groups(backend: Backend, model: Model, example: Arrays) -> tuple[Groups, str]:
    """Return the groups, or none and the reason where the backend finds none in any model of its kind."""
    try:
        return backend.groups(model, example), ""
    except Refused as refused:
        return Groups(()), str(refused)


def list_methods(backend: str) -> set[str]:
    """Return the names of the methods that have a handler for a backend.

    >>> "PruneChannels" in list_methods("numpy")
    True
    """
    return {name for name, kind in load_methods().items() if {backend, "any"} & set(backends_of(kind))}
