"""Distillation block by block, without labels."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationInfo, field_validator

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Outcome
from penjing.core.registry import handles
from penjing.core.value import Model
from penjing.train.hooks import Hooks
from penjing.train.loop import fit
from penjing.train.objective import tensors_of
from penjing.train.teacher import Taught, alone, resting


class DistillBlocks(Taught):
    """Train each block of the model towards the same block of the original, given the original's input.

    All blocks learn at once and none waits for those before it: one pass of the original gives the inputs
    and the wanted outputs of all. The loss of a block is the squared error over the squares of the wanted
    outputs. Labels are not used; what is in no block stays as it is. After a cut that leaves the blocks'
    inputs and outputs their shapes: heads, neurons, inner channels, single weights (block-local
    distillation: Bercovich et al., "Puzzle", 2024). `stochastic_depth` and `recompute` are not for it.

    Attributes:
        blocks: names of blocks; empty: found, modules in a row that both networks have.
    """

    blocks: tuple[str, ...] = ()

    @field_validator("stochastic_depth", "recompute")
    @classmethod
    def _apart(cls, value: float | bool, info: ValidationInfo) -> float | bool:
        if value:
            raise ValueError(f"{info.field_name} is for blocks in a row, and each learns for itself here")
        return value


@handles(DistillBlocks, "torch")
def distill_blocks(model: Model, method: DistillBlocks, context: Context) -> Outcome:
    """Train the blocks of a torch module; a change for every block.

    Raises:
        Refused: several teachers, a block that is named and does not fit, or what `penjing.train.loop.fit`
            refuses.
    """
    from penjing.backends.torch.distill.local_blocks import Local, blocks_in_common

    alone(context)
    found = blocks_in_common(model, context.original, context.task.valid.example(), method.blocks)
    chosen = [name for name in found.names if _covered(model, name, context)]
    skipped = [_change(name, "skipped", reason) for name, reason in found.reasons.items()]
    if method.blocks and found.reasons:
        name, reason = next(iter(found.reasons.items()))
        raise Refused(
            "a block of the student fits the teacher's",
            value=reason,
            place=f"blocks, {name}",
            fix="leave it out, or use Distill",
        )
    if not chosen:
        return Outcome(model, skipped or [_change("*", "skipped", "no modules in a row in both networks")])
    start = time.perf_counter()
    with resting(context, method.precision) as teacher:
        local = Local({name: model.get_submodule(name) for name in chosen}, teacher, teacher.module)
        size = method.batch_size or context.task.batch_size
        before = _errors(local, context, size)
        done = fit(
            local,
            context.task.train,
            lambda outputs, inputs, targets: sum(outputs),
            method.sized(context.task),
            seed=context.seed,
            covers=lambda layer: context.covers(local.layer(layer)),
            hooks=replace(Hooks(), say=lambda line: context.say(line.under("DistillBlocks"))),
        )
        after = _errors(local, context, size)
    notes = context.notes
    notes["training_s"] = notes.get("training_s", 0.0) + time.perf_counter() - start
    notes.setdefault("events", []).extend(f"DistillBlocks: {event}" for event in done.events)
    changes = [
        _change(name, "done", "", {"error_before": a, "error_after": b, "steps": done.steps})
        for name, a, b in zip(chosen, before, after, strict=True)
    ]
    return Outcome(model, [*changes, *skipped])


def _covered(model: Model, block: str, context: Context) -> bool:
    names = (name.rpartition(".")[0] for name, _ in model.get_submodule(block).named_parameters())
    return any(context.covers(f"{block}.{name}".rstrip(".")) for name in names)


def _change(block: str, status: Any, reason: str, detail: dict[str, Any] | None = None) -> Change:
    rounded = {key: round(value, 6) for key, value in (detail or {}).items()}
    return Change(method="DistillBlocks", layer=block, status=status, reason=reason, detail=rounded)


def _errors(local: Any, context: Context, size: int) -> list[float]:
    """Return the mean loss of each block in evaluation mode over at most four batches, always the same."""
    import torch

    modes = [(module, module.training) for module in local.modules()]
    local.eval()
    rows = []
    try:
        with torch.no_grad():
            for inputs, _ in context.task.train.batches(size, context.seed):
                outputs = local(*tensors_of(inputs, next(local.parameters())))
                rows.append([float(loss) for loss in outputs])
                if len(rows) == 4:
                    break
    finally:
        for module, mode in modes:
            module.training = mode
    return [float(value) for value in np.mean(rows, axis=0)]
