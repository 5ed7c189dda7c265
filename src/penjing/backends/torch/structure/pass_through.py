"""What stands in for a block that is gone, and the main input and output of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penjing.backends.torch.hooks import Call

Source = int | str | None
"""Which argument of a block an output is: a position, a keyword, or None for an output that is None."""


class PassThrough(nn.Module):  # type: ignore[misc]
    """Stands where a block was: returns what entered it, in the form that the block returned.

    Args:
        sources: for each output, the argument that it is.
        single: whether the block returned one tensor instead of a tuple.
        plain: attributes of the block that the code around it may read: numbers, texts, None.
    """

    def __init__(self, sources: tuple[Source, ...], single: bool, plain: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in plain.items():
            setattr(self, name, value)
        self._sources, self._single = sources, single

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's input."""
        found = tuple(
            None if s is None else args[s] if isinstance(s, int) else kwargs[s] for s in self._sources
        )
        return found[0] if self._single else found

    def extra_repr(self) -> str:
        """Say nothing: the sources follow from the block."""
        return ""


@contextlib.contextmanager
def bypassing(model: nn.Module, gone: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put pass-throughs in the place of blocks for a while."""
    before = {name: model.get_submodule(name) for name in gone}
    try:
        for name, stand_in in gone.items():
            set_submodule(model, name, stand_in)
        yield
    finally:
        for name, module in before.items():
            set_submodule(model, name, module)


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of this name."""
    place, _, key = name.rpartition(".")
    model.get_submodule(place)._modules[key] = module


def main_input(call: Call) -> tuple[int | str, Tensor] | None:
    """Return key and value of a block's first argument that is a tensor of floating-point numbers."""
    for key, value in call.arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return key, value
    return None


def main_output(output: Any) -> Any:
    """Return the first of what a block returned."""
    return output[0] if isinstance(output, tuple) and output else output
