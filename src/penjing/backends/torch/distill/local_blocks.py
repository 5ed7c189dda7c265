"""Blocks of a student beside the same blocks of its teacher, each given what the teacher's is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from penjing.backends.torch.distill.feature_losses import relative_squares
from penjing.backends.torch.hooks import Call, watched
from penjing.backends.torch.structure.pass_through import PassThrough, main_output
from penjing.backends.torch.tensors import evaluating, find_layer, to_inputs
from penjing.core.backend import Arrays


@dataclass(frozen=True)
class CommonBlocks:
    """Blocks that can learn, in the order in which they end, and why others cannot.

    Attributes:
        names: of modules that both networks have, none within another.
        reasons: by name, for those that look like blocks and are none.
    """

    names: tuple[str, ...]
    reasons: Mapping[str, str]


def find_common_blocks(
    student: nn.Module, teacher: nn.Module, example: Arrays, named: Sequence[str] = ()
) -> CommonBlocks:
    """Find the blocks of two networks, or check those that are named, by running both on an example.

    A block is a module with layers inside that stands in a row (a member of an `nn.Sequential` or
    `nn.ModuleList`, or one of several children of one class) in both under one name. It runs once and gives
    a tensor. Where blocks lie within one another, the inner ones count if they hold at least half of the
    outer one's weights. The student's block takes what the teacher's is given and makes the same shape of it.

    Raises:
        Refused: a name that one of the networks does not have.
    """
    for name in named:
        find_layer(student, name), find_layer(teacher, name)
    both = set(_in_a_row(teacher))
    names = list(named) or _innermost(student, [name for name in _in_a_row(student) if name in both])
    runs = _runs(teacher, names, example)
    reasons: dict[str, str] = {}
    for name in names:
        calls = runs.get(name, [])
        if not any(p.is_floating_point() for p in student.get_submodule(name).parameters()):
            reasons[name] = "it has no weights"
        elif len(calls) != 1 or not isinstance(calls[0].output, torch.Tensor):
            reasons[name] = (
                f"it runs {len(calls)} times in a pass" if len(calls) != 1 else "it gives no tensor"
            )
        else:
            reasons[name] = _misfit(student.get_submodule(name), calls[0])
    good = [name for name in runs if not reasons[name]]
    return CommonBlocks(tuple(good), {name: reason for name, reason in reasons.items() if reason})


def _in_a_row(model: nn.Module) -> list[str]:
    found = []
    for name, parent in model.named_modules():
        classes = [type(child) for child in parent.children()]
        for key, child in parent.named_children():
            row = isinstance(parent, nn.Sequential | nn.ModuleList) or classes.count(type(child)) > 1
            whole = any(True for _ in child.children()) and not isinstance(child, PassThrough)
            if row and whole and any(p.ndim > 1 for p in child.parameters()):
                found.append(f"{name}.{key}".lstrip("."))
    return found


def _innermost(model: nn.Module, names: Sequence[str]) -> list[str]:
    def weights(name: str) -> int:
        return sum(p.numel() for p in model.get_submodule(name).parameters())

    left = list(names)
    for outer in sorted(names, key=lambda name: -name.count(".")):
        inner = [name for name in left if name.startswith(f"{outer}.")]
        if inner:
            gone = [outer] if 2 * sum(map(weights, inner)) >= weights(outer) else inner
            left = [name for name in left if name not in gone]
    return left


def _runs(model: nn.Module, names: Sequence[str], example: Arrays) -> dict[str, list[Call]]:
    seen: dict[str, list[Call]] = {}
    blocks = {name: model.get_submodule(name) for name in names}
    record = record_blocks(blocks, lambda name, run: seen.setdefault(name, []).append(run))
    with record, evaluating(model), torch.no_grad():
        model(*to_inputs(model, example))
    return seen


def _misfit(block: nn.Module, run: Call) -> str:
    """Say why a block of the student cannot stand beside one of the teacher, or nothing."""
    given = next((x for x in (*run.args, *run.kwargs.values()) if isinstance(x, torch.Tensor)), None)
    shape = "nothing" if given is None else list(given.shape[1:])
    with evaluating(block), torch.no_grad():
        try:
            made = main_output(block(*run.args, **run.kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            line = (str(error).strip().splitlines() or [""])[0][:120]
            return f"it cannot take the teacher's {shape}: {line}"
    if isinstance(made, torch.Tensor) and made.shape == run.output.shape:
        return ""
    mine = list(made.shape[1:]) if isinstance(made, torch.Tensor) else type(made).__name__
    return f"it makes {mine} of {shape}, the teacher's makes {list(run.output.shape[1:])}"


def record_blocks(
    blocks: Mapping[str, nn.Module], record: Callable[[str, Call], None]
) -> AbstractContextManager[None]:
    """Record every call of some blocks; its output is a copy of the block's first output."""
    return watched(
        blocks, lambda name, call: record(name, replace(call, output=_copy(main_output(call.output))))
    )


def _rerun(block: nn.Module, run: Call) -> Tensor:
    """Return what a block makes of another's inputs, on its own device and in its own type of numbers."""
    like = next(p for p in block.parameters() if p.is_floating_point())

    def own(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    args, kwargs = [own(value) for value in run.args], {k: own(v) for k, v in run.kwargs.items()}
    output: Tensor = main_output(block(*args, **kwargs))
    return output


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class LocalBlocks(nn.Module):  # type: ignore[misc]
    """Runs the teacher, and each block of the student on what the teacher's block is given.

    Args:
        blocks: of the student, by name; only they are parts of this module.
        teacher: a frozen module in evaluation mode, or a function that runs one.
        module: the teacher's module, whose blocks are watched.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], teacher: Any, module: nn.Module) -> None:
        super().__init__()
        self.names = tuple(blocks)
        self.blocks = nn.ModuleList(blocks.values())
        self._outside = (teacher, module)  # a tuple, so that the teacher is no part of this module

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Return for each block the squared error of its outputs over the squares of the teacher's."""
        teacher, module = self._outside
        runs: dict[str, Call] = {}
        blocks = {name: module.get_submodule(name) for name in self.names}
        with record_blocks(blocks, runs.__setitem__):
            teacher(inputs)
        pairs = zip(self.blocks, (runs[name] for name in self.names), strict=True)
        made = [(_rerun(block, run).float(), run.output.float()) for block, run in pairs]
        return [relative_squares(mine, its.to(mine.device)) for mine, its in made]

    def layer(self, name: str) -> str:
        """Return the name that a layer of this module has in the student."""
        _, number, rest = (name + "..").split(".", 2)
        return ".".join([self.names[int(number)], rest]).strip(".")
