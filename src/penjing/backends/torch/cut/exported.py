"""The module that runs generated code in place of a forward that has its widths written into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

NAMES: dict[str, Any] = {
    "torch": torch,
    "device": torch.device,
    "inf": float("inf"),
    "nan": float("nan"),
    "NoneType": type(None),
    "math": math,
}
"""What generated source may refer to."""


class Code:
    """Source of a forward function, compiled when it is first called; copies and pickles as its text."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._function: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        if self._function is None:
            names = dict(NAMES)
            exec(compile(self.source, "<exported>", "exec"), names)
            self._function = names["forward"]
        return self._function(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        return Code(self.source)

    def __reduce__(self) -> tuple[type[Code], tuple[str]]:
        return (Code, (self.source,))


class ExportedNet(nn.Module):  # type: ignore[misc]
    """A module that runs a captured graph on the user's own submodules.

    Parameters, buffers and submodules have the names of the user's module; convolutions, linear layers and
    BatchNorm are called as modules, so that modes and hooks work. It trains, copies and exports again.
    `structure` is torch's JSON of the containers that the module returns; empty for one tensor.
    """

    def __init__(self, like: nn.Module, code: Code, names: tuple[str, ...], structure: str = "") -> None:
        super().__init__()
        # The user's own attributes come along: tensors that are no buffers are read from there.
        self.__dict__.update({k: v for k, v in like.__dict__.items() if k not in ("forward", "input_names")})
        self._penjing_code = code
        self._penjing_structure = structure
        self.input_names = names

    def forward(self, *inputs: Any) -> Any:
        """Run the graph and return its outputs in the containers of the user's module."""
        outputs = self._penjing_code(self, *inputs)
        if not self._penjing_structure:
            return outputs
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self._penjing_structure))
