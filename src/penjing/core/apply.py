"""Carry a plan out on a copy of a model and report every layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from penjing.core.backend import Arrays, Backend, backend_for, backend_named, enter
from penjing.core.context import Context
from penjing.core.errors import Refused, nearest
from penjing.core.method import Change, Method, Only, inner, name_of, unmatched
from penjing.core.plan import Plan
from penjing.core.provenance import Provenance, provenance_of, remember
from penjing.core.registry import handler_for
from penjing.core.task import Task
from penjing.core.value import Model


@dataclass(frozen=True)
class Applied:
    """A changed copy of a model.

    Attributes:
        model: the copy; of the same framework, or an `OnnxModel` once a method worked on integers.
        changes: one entry for every layer that a method considered, step by step.
        plan: the methods that were carried out.
        notes: facts for the record, for example seconds of training.
        before: what earlier calls of `apply` had done to the model.
    """

    model: Model
    changes: tuple[Change, ...]
    plan: Plan
    notes: dict[str, Any] = field(default_factory=dict)
    before: Provenance = field(default_factory=Provenance, repr=False)

    @property
    def provenance(self) -> Provenance:
        """Everything that was done to the model, from the first call of `apply` on."""
        return Provenance((*self.before.plan, *self.plan), (*self.before.changes, *self.changes))


Watch = Callable[[int, Backend, Model], None]


def apply(
    model: Model | Applied,
    plan: Plan | Method,
    task: Task,
    *,
    context: Context | None = None,
    watch: Watch | None = None,
) -> Applied:
    """Apply a plan to a copy of a model; the argument is never changed.

    A method that the model's backend has no handler for, but ONNX has, makes the model an `OnnxModel`
    from that step on (integers exist in the exported graph, not in a float framework). The result has run
    once, on an example of valid, before it is returned.

    Args:
        model: a model, or what an earlier `apply` returned.
        plan: one method or several, in a legal order.
        task: data, loss and metric.
        context: what handlers may know; made from the task where it is not given.
        watch: called after every step with its number, the backend and the model so far.

    Raises:
        Refused: no handler, a pattern that matches no layer, a step that changed nothing, a result that
            does not run, or whatever the method itself refuses.

    >>> import penjing as pj
    >>> from penjing.backends.numpy import Node, NumpyNet
    >>> rng = np.random.default_rng(0)
    >>> net = NumpyNet(("x",), (Node("fc", "linear", ("x",)),), {"fc": {"weight": rng.normal(size=(4, 8))}})
    >>> task = Task(train=(rng.normal(size=(90, 8)), np.arange(90) % 4))
    >>> (change,) = apply(net, pj.PruneMagnitude(0.75), task).changes
    >>> change.layer, change.status, change.detail["sparsity"]
    ('fc', 'done', 0.75)
    """
    plan = (plan,) if isinstance(plan, Method) else tuple(plan)
    model = model.model if isinstance(model, Applied) else model
    before = provenance_of(model)
    task = task.prepare()
    backend, model, task = enter(model, task)
    example = task.valid.example()
    backend.check(model, example)
    context = context or Context(task=task, backend=backend, original=model)
    current = backend.copy(model)
    changes: list[Change] = []
    for index, method in enumerate(plan):
        backend, current = _to_backend_with_handler(method, backend, current, context)
        _refuse_unmatched(method, backend, current)
        handler = handler_for(method, backend.name)
        assert handler is not None
        outcome = handler(current, inner(method), replace(context, backend=backend, covers=_covers(method)))
        _refuse_if_nothing_changed(method, outcome.changes)
        current, backend = outcome.model, backend_for(outcome.model)
        changes.extend(outcome.changes)
        if watch is not None:
            watch(index, backend, current)
    _refuse_unless_it_runs(backend, current, example, plan)
    applied = Applied(current, tuple(changes), plan, context.notes, before)
    remember(current, applied.provenance)
    return applied


def _refuse_unless_it_runs(backend: Backend, model: Model, example: Arrays, plan: Plan) -> None:
    place = " + ".join(name_of(method) for method in plan) or "apply"
    try:
        output = np.asarray(backend.run(model, example))
    except Refused:
        raise
    except Exception as error:  # a framework may raise anything of its own; what it says is the reason
        raise Refused(
            "the result must run on an example of valid",
            value=f"{type(error).__name__}: {str(error)[:200]}",
            place=place,
            fix="give the model in single precision (model.float()), or leave the step out",
        ) from error
    if output.dtype.kind == "f" and not np.isfinite(output).all():
        raise Refused(
            "the outputs of the result must be finite",
            value=f"NaN or infinity in {int((~np.isfinite(output)).sum())} of {output.size} values",
            place=place,
            fix="give the model in single precision (model.float()), or a milder setting of the step",
        )


def _refuse_unmatched(method: Method, backend: Backend, model: Model) -> None:
    names = dict.fromkeys(
        ".".join(parts[:depth])
        for parts in (layer.name.split(".") for layer in backend.layers(model))
        for depth in range(len(parts), 0, -1)
    )
    if part := unmatched(method, names):
        raise Refused(
            "must match a layer of the model",
            value=repr(part),
            place=f"each pattern of only(..., {name_of(method)})",
            fix=nearest(part.removeprefix("!"), names),
        )


def _covers(method: Method) -> Any:
    return method.covers if isinstance(method, Only) else lambda layer: True


def _to_backend_with_handler(
    method: Method, backend: Backend, model: Model, context: Context
) -> tuple[Backend, Model]:
    if handler_for(method, backend.name) is not None:
        return backend, model
    if backend.name == "onnx" or handler_for(method, "onnx") is None:
        raise Refused(
            "the method needs a handler for the model's backend",
            value=f"{name_of(method)} on {backend.name}",
            place="apply",
            fix="leave the method out, or move it before the step that made the model ONNX",
        )
    return to_onnx(backend, model, context)


def to_onnx(backend: Backend, model: Model, context: Context) -> tuple[Backend, Model]:
    """Export a model and return the ONNX backend with the result; the seconds are noted.

    Raises:
        Refused: the export fails.
    """
    onnx, start = backend_named("onnx"), time.perf_counter()
    adopted = onnx.adopt(backend, model, context.task.valid.example())  # type: ignore[attr-defined]
    context.notes["export_s"] = context.notes.get("export_s", 0.0) + time.perf_counter() - start
    return onnx, adopted


def _refuse_if_nothing_changed(method: Method, changes: list[Change]) -> None:
    if any(change.done for change in changes):
        return
    if isinstance(method, Only) and not changes:
        raise Refused(
            "the pattern must match a layer that the method can change",
            value=method.pattern,
            place=f"only({method.pattern!r}, {name_of(method)})",
            fix="list the layer names with `penjing inspect`",
        )
    reasons = "; ".join(sorted({f"{c.layer}: {c.reason}" for c in changes})[:5])
    raise Refused(
        "must change at least one layer",
        value=reasons or "no layer fits",
        place=name_of(method),
        fix="leave the step out; `penjing inspect` lists what can change",
    )
