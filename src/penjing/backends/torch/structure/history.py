"""What was done to the structure of a module: replayed on its class, and traced back to its first tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

HISTORY = "_penjing_history"
LINEAGE = "_penjing_lineage"

Entry = dict[str, Any]
"""One structural step as plain data, by its kind: `{"keep": {group: [units]}}` for a cut."""

Lineage = dict[str, dict[int, NDArray[np.int64]]]
"""By tensor name and axis: which indices of the tensor in the first model are still there, in order."""


def history(model: nn.Module) -> list[Entry]:
    """Return the structural steps that made a module, oldest first, as plain data.

    >>> short = nn.Linear(2, 2)
    >>> record_step(short, nn.Linear(2, 2), {"skip": ["layer1.0"]})
    >>> history(short)
    [{'skip': ['layer1.0']}]
    """
    return copy.deepcopy(getattr(model, HISTORY, []))


def record_step(model: nn.Module, before: nn.Module, entry: Entry) -> None:
    """Write on a module that it was made from `before` by one more step."""
    setattr(model, HISTORY, [*history(before), entry])


def lineage(model: nn.Module) -> Lineage:
    """Return where the rows and columns of a module's tensors come from; nothing for tensors never cut.

    The input axis of a grouped convolution's weight counts the channels of all blocks.
    """
    return {name: dict(axes) for name, axes in getattr(model, LINEAGE, {}).items()}


def record_lineage(model: nn.Module, kept: Mapping[str, Mapping[int, NDArray[np.int64]]]) -> None:
    """Note that of these tensors' axes only these indices are left, counted before the step."""
    known = lineage(model)
    for name, axes in kept.items():
        for axis, indices in axes.items():
            before = known.setdefault(name, {}).get(axis)
            known[name][axis] = indices if before is None else before[indices]
    setattr(model, LINEAGE, known)
