"""Outputs of layers on the way through a network, and layers of two networks that belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from penjing.arrays.distillation import uniform_mapping
from penjing.backends.torch.hooks import hooked
from penjing.backends.torch.structure.blocks import find_blocks
from penjing.backends.torch.structure.pass_through import main_output
from penjing.backends.torch.tensors import evaluating, find_layer, to_inputs
from penjing.core.backend import Arrays
from penjing.core.errors import Refused

Seen = dict[str, Tensor]
"""The last output of each tapped layer, with its gradient's history where the pass has one."""


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[Seen]:
    """Yield a dictionary that every pass fills with the outputs of layers, while the context lasts.

    Raises:
        Refused: no layer has this name.
    """
    modules = {name: find_layer(model, name) for name in names}
    seen: Seen = {}

    def tap(name: str, given: tuple[Any, ...], output: Any) -> None:
        seen[name] = main_output(output)

    with hooked(modules, after=tap):
        yield seen


def read_output_shapes(
    model: nn.Module, names: Sequence[str], example: Arrays, whose: str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of layers' outputs for an example, without the axis of examples.

    Raises:
        Refused: an unknown layer, or one that gives no tensor of floating-point numbers for each example.
    """
    with tapped(model, names) as seen, evaluating(model), torch.no_grad():
        model(*to_inputs(model, example))
    for name in names:
        found = seen.get(name)
        if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.ndim < 2:
            kind = type(found).__name__ if found is not None else "nothing: it is not called as a module"
            raise Refused(
                "must give a tensor of floating-point numbers",
                value=kind,
                place=f"{whose}.{name}",
                fix="name a layer that does",
            )
    return {name: tuple(seen[name].shape[1:]) for name in names}


def pair_layers(student: nn.Module, teacher: nn.Module, example: Arrays) -> list[tuple[str, str]]:
    """Return layers of two networks that belong together, in the order in which they run.

    Of networks for images the last layers at every size of feature maps that both have (the ends of their
    stages); of others the blocks in a row (`blocks.find_blocks`), the student's i-th of m beside the
    teacher's i n / m-th of n, rounded up (the uniform mapping of Jiao et al., "TinyBERT", 2020).

    Raises:
        Refused: there are neither.
    """
    ends = [_stage_ends(model, example) for model in (student, teacher)]
    shared = [size for size in ends[0] if size in ends[1]]
    if shared:
        return [(ends[0][size], ends[1][size]) for size in shared]
    rows = [list(find_blocks(model, example).found) for model in (student, teacher)]
    m, n = len(rows[0]), len(rows[1])
    if not m or not n:
        raise Refused(
            "needs layers that belong together",
            place="pairs",
            value="no feature maps of one size, and no blocks in a row",
            fix='name them: pairs={"layer of the student": "layer of the teacher"}',
        )
    return [(name, rows[1][its]) for name, its in zip(rows[0], uniform_mapping(m, n), strict=True)]


def _stage_ends(model: nn.Module, example: Arrays) -> dict[tuple[int, ...], str]:
    """Return the last layer of each size of feature maps, in the order in which the sizes first appear."""
    found: dict[tuple[int, ...], str] = {}

    def tap(name: str, given: tuple[Any, ...], output: Any) -> None:
        output = main_output(output)
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            found[tuple(output.shape[2:])] = name

    modules = {name: module for name, module in model.named_modules() if name}
    with hooked(modules, after=tap), evaluating(model), torch.no_grad():
        model(*to_inputs(model, example))
    return found


class Guided(nn.Module):  # type: ignore[misc]
    """A student beside the projections of its features, which train with it."""

    def __init__(self, student: nn.Module, projections: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleDict({str(number): module for number, module in projections.items()})

    def forward(self, *inputs: Tensor) -> Any:
        """Return the student's outputs."""
        return self.student(*inputs)

    def projected(self, number: int, features: Tensor) -> Tensor:
        """Return features of the student as the teacher has them."""
        key = str(number)
        return self.projections[key](features) if key in self.projections else features


def make_projection(student: tuple[int, ...], teacher: tuple[int, ...], like: nn.Parameter) -> nn.Module:
    """Return a layer that gives one shape of features from another: a 1x1 convolution, or a linear layer.

    Args:
        student, teacher: `[channels, h, w]` with equal `h` and `w`, or `[..., channels]`.
        like: a parameter whose device and type it takes.
    """
    if len(student) == 3:
        layer: nn.Module = nn.Conv2d(student[0], teacher[0], 1, bias=False)
    else:
        layer = nn.Linear(student[-1], teacher[-1])
    return layer.to(like.device, like.dtype)
