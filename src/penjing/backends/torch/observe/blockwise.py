"""Blocks of a module that can be looked at alone, and what goes into and comes out of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from penjing.backends.torch.hooks import EndOfPass, hooked
from penjing.backends.torch.tensors import evaluating

RUN = 64
"""Examples that run at once."""


def partition_into_blocks(
    model: nn.Module, layers: Sequence[str], inputs: tuple[Tensor, ...], largest: int
) -> list[str]:
    """Return names of modules that hold all given layers between them, in the order in which they end.

    Modules as large as possible with at most `largest` of the layers, each called once, on one tensor and
    nothing by name, giving one tensor (the blocks of Li et al. 2021, "BRECQ"). A layer outside any such
    module stands alone; layers that are called other than once, or on several tensors, are left out.
    """
    order, single = _calls(model, inputs)
    found: list[str] = []
    for name, _ in model.named_modules():
        inside = [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]
        covered = any(name.startswith(f"{other}.") for other in found)
        if name in single and inside and not covered and (name in inside or len(inside) <= largest):
            found.append(name)
    return sorted(found, key=order.index)


def _calls(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[str], set[str]]:
    """Return modules in the order in which they end, and those called once, from one tensor to one."""
    ends: list[str] = []
    alone: set[str] = set()
    plain: set[str] = set()

    # As the caller gives it, before hooks of the module's own add to it.
    def before(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if len(given) == 1 and isinstance(given[0], torch.Tensor) and not named:
            alone.add(name)

    def behind(name: str, given: tuple[Any, ...], output: Any) -> None:
        ends.append(name)
        if name in alone and isinstance(output, torch.Tensor):
            plain.add(name)

    with (
        hooked(dict(model.named_modules()), before, behind, first=True),
        evaluating(model),
        torch.no_grad(),
    ):
        model(*inputs)
    return ends, {name for name in plain if ends.count(name) == 1}


def record_block(model: nn.Module, name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return a block's input and output over all examples, in evaluation mode; nothing behind it runs.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    >>> given, made = record_block(net, "1", (torch.ones(5, 2, 2),))
    >>> given.shape, made.shape
    (torch.Size([5, 4]), torch.Size([5, 3]))
    """
    given, made = [], []

    def record(name: str, arguments: tuple[Any, ...], output: Tensor) -> None:
        given.append(arguments[0].detach())
        made.append(output.detach())
        raise EndOfPass

    with hooked({name: model.get_submodule(name)}, after=record), evaluating(model), torch.no_grad():
        for start in range(0, len(inputs[0]), RUN):
            with suppress(EndOfPass):
                model(*(x[start : start + RUN] for x in inputs))
    return torch.cat(given), torch.cat(made)


def relative_error(block: nn.Module, given: Tensor, wanted: Tensor) -> float:
    """Return the squared error of a block's outputs over the square of the wanted ones."""
    gap = total = 0.0
    with evaluating(block), torch.no_grad():
        for start in range(0, len(given), RUN):
            part = wanted[start : start + RUN]
            gap += float((block(given[start : start + RUN]) - part).square().sum())
            total += float(part.square().sum())
    return gap / max(total, 1e-30)
