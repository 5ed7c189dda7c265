"""What stands in for a block that is gone, and blocks watched while their network runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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


@dataclass(frozen=True)
class Call:
    """One run of a block.

    Attributes:
        arguments: by position or keyword, as they were before the block ran (it may work in place).
        given: the same objects as the block got them.
        output: what it returned.
    """

    arguments: dict[int | str, Any]
    given: dict[int | str, Any]
    output: Any


@contextlib.contextmanager
def without(model: nn.Module, gone: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put pass-throughs in the place of blocks for a while."""
    before = {name: model.get_submodule(name) for name in gone}
    try:
        for name, stand_in in gone.items():
            put(model, name, stand_in)
        yield
    finally:
        for name, module in before.items():
            put(model, name, module)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of this name."""
    place, _, key = name.rpartition(".")
    model.get_submodule(place)._modules[key] = module


def run_watched(
    model: nn.Module,
    members: Mapping[str, nn.Module],
    inputs: tuple[Any, ...],
    watch: Callable[[str, Call], None],
) -> Any:
    """Run a module, tell of every run of its members as it ends, and return the module's output."""
    entered: dict[str, tuple[dict[int | str, Any], dict[int | str, Any]]] = {}

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: dict[int | str, Any] = dict(enumerate(args))
            given.update(kwargs.items())
            copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            entered[name] = (copies, given)

        return hook

    def leaving(name: str) -> Callable[..., None]:
        return lambda module, args, output: watch(name, Call(*entered.pop(name), output))

    hooks: list[Any] = []
    try:
        for name, module in members.items():
            hooks.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(leaving(name)))
        return model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def main_input(call: Call) -> tuple[int | str, Any] | None:
    """Return key and value of a block's first argument that is a tensor of floating-point numbers."""
    for key, value in call.arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return key, value
    return None


def main_output(output: Any) -> Any:
    """Return the first of what a block returned."""
    return output[0] if isinstance(output, tuple) and output else output
