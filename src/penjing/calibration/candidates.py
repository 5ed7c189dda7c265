"""Which layers of a model can become sparse, and why others cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.sparsity.patterns import kept_count
from penjing.calibration.settings import Sparse
from penjing.core.backend import Layer, MaskBackend
from penjing.core.context import Context
from penjing.core.method import Changes
from penjing.core.value import Model

WEIGHTED = ("conv", "depthwise", "linear")


@dataclass(frozen=True)
class Candidate:
    """A layer that is to become sparse: its description and its weight `[out, in, *kernel]`."""

    layer: Layer
    weight: NDArray[Any]

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for a linear layer."""
        return self.layer.window.groups if self.layer.window is not None else 1

    @property
    def columns(self) -> int:
        """Inputs of one output: `in * kernel`."""
        return math.prod(self.weight.shape[1:])


def find_candidates(model: Model, method: Sparse, context: Context) -> tuple[list[Candidate], Changes]:
    """Return the layers that the plan covers and that can take the pattern, and changes for the others.

    Convolutions and linear layers come first to last as the backend lists them. What has no weight matrix
    (normalization, bias alone) is not spoken of.
    """
    found: list[Candidate] = []
    changes = Changes(method)
    tables = {
        layer.name: context.backend.read(model, layer.name)["weight"]
        for layer in context.backend.layers(model)
        if layer.kind == "embedding" and "weight" in layer.shapes
    }
    for layer in context.backend.layers(model):
        if not context.covers(layer.name) or layer.kind == "batchnorm":
            continue
        if layer.kind not in WEIGHTED or "weight" not in layer.shapes:
            if any(len(shape) > 1 for shape in layer.shapes.values()):
                changes.skip(layer.name, _why_unfit(layer))
            continue
        candidate = Candidate(layer, context.backend.read(model, layer.name)["weight"])
        reason = _why_not(candidate, method, tables, found)
        if reason:
            changes.skip(layer.name, reason)
        else:
            found.append(candidate)
    by_itself = method.uniform or method.zeros.group
    reason = "" if by_itself else _sparse_enough([c.weight for c in found], method)
    for candidate in found if reason else ():
        changes.skip(candidate.name, reason)
    return ([] if reason else found), changes


def _why_unfit(layer: Layer) -> str:
    if layer.kind == "embedding":
        return "a table of embeddings is looked up, not multiplied"
    return "its weights are not read as [out, in, *kernel]"


def _why_not(
    candidate: Candidate, method: Sparse, tables: dict[str, NDArray[Any]], others: list[Candidate]
) -> str:
    weight, pattern = candidate.weight, method.zeros
    misfit = pattern.misfit(weight.shape, candidate.groups)
    if misfit:
        return f"the pattern {method.pattern} does not fit: {misfit}"
    table = next((name for name, array in tables.items() if _equal(array, weight)), "")
    if table:
        return f"its weight is that of the embedding {table}"
    twin = next((other.name for other in others if _equal(other.weight, weight)), "")
    if twin:
        return f"its weight is that of {twin}"
    return _sparse_enough([weight], method) if method.uniform and not pattern.group else ""


def _sparse_enough(weights: Sequence[NDArray[Any]], method: Sparse) -> str:
    """Say that weights together have as many zeros already as a method would make; else empty."""
    size = sum(weight.size for weight in weights)
    zeros = size - sum(int(np.count_nonzero(weight)) for weight in weights)
    if not zeros or zeros < size - kept_count(size, method.share):
        return ""
    whose = "its weights" if method.uniform else "the weights of these layers together"
    return f"already {zeros / size:.1%} of {whose} are zero"


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.size > 1 and np.array_equal(a, b)


def describe_mask(mask: NDArray[np.bool_]) -> dict[str, float | int | str]:
    """Return what the change of a layer that became sparse says: its share of zeros and number of weights."""
    return {"sparsity": round(1 - float(mask.mean()), 6), "weights": mask.size}


def to_matrices(candidate: Candidate, order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weight as `[groups, out / groups, columns]` in double precision, columns in an order."""
    weight = candidate.weight.astype(np.float64)
    return weight.reshape(candidate.groups, -1, candidate.columns)[:, :, order]


def from_matrices(candidate: Candidate, parts: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    """Return what `to_matrices` made in the shape of the weight again."""
    back = np.empty_like(parts)
    back[:, :, order] = parts
    return back.reshape(candidate.weight.shape)


def keep_masks(model: Model, context: Context, masks: dict[str, NDArray[np.bool_]]) -> None:
    """Have the backend remember masks by layer, where it can: training then leaves zeros zero."""
    if isinstance(context.backend, MaskBackend) and masks:
        context.backend.set_masks(model, {f"{layer}.weight": mask for layer, mask in masks.items()})
