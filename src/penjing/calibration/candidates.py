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
from penjing.core.method import Change, Method
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


def candidates(model: Model, method: Sparse, context: Context) -> tuple[list[Candidate], list[Change]]:
    """Return the layers that the plan covers and that can take the pattern, and changes for the others.

    Convolutions and linear layers come first to last as the backend lists them. What has no weight matrix
    (normalization, bias alone) is not spoken of.
    """
    found: list[Candidate] = []
    skips: list[Change] = []
    tables = {
        layer.name: context.backend.read(model, layer.name)["weight"]
        for layer in context.backend.layers(model)
        if layer.kind == "embedding" and "weight" in layer.shapes
    }
    for layer in context.backend.layers(model):
        if not context.covers(layer.name) or layer.kind == "batchnorm":
            continue
        shapes = [shape for shape in layer.shapes.values() if len(shape) > 1]
        if layer.kind not in WEIGHTED or "weight" not in layer.shapes:
            skips += [skipped(method, layer.name, _unfit(layer))] * bool(shapes)
            continue
        candidate = Candidate(layer, context.backend.read(model, layer.name)["weight"])
        reason = _reason(candidate, method, tables, found)
        if reason:
            skips.append(skipped(method, layer.name, reason))
        else:
            found.append(candidate)
    by_itself = method.alike or method.zeros.group
    reason = "" if by_itself else _sparse_enough([c.weight for c in found], method)
    return ([], skips + [skipped(method, c.name, reason) for c in found]) if reason else (found, skips)


def _unfit(layer: Layer) -> str:
    if layer.kind == "embedding":
        return "a table of embeddings is looked up, not multiplied"
    return "its weights are not read as [out, in, *kernel]"


def _reason(
    candidate: Candidate, method: Sparse, tables: dict[str, NDArray[Any]], others: list[Candidate]
) -> str:
    weight, pattern = candidate.weight, method.zeros
    misfit = pattern.misfit(weight.shape, candidate.groups)
    if misfit:
        return f"the pattern {method.pattern} does not fit: {misfit}"
    table = next((name for name, array in tables.items() if _same(array, weight)), "")
    if table:
        return f"its weight is that of the embedding {table}"
    twin = next((other.name for other in others if _same(other.weight, weight)), "")
    if twin:
        return f"its weight is that of {twin}"
    return _sparse_enough([weight], method) if method.alike and not pattern.group else ""


def _sparse_enough(weights: Sequence[NDArray[Any]], method: Sparse) -> str:
    """Say that weights together have as many zeros already as a method would make; else empty."""
    size = sum(weight.size for weight in weights)
    zeros = size - sum(int(np.count_nonzero(weight)) for weight in weights)
    if not zeros or zeros < size - kept_count(size, method.share):
        return ""
    whose = "its weights" if method.alike else "the weights of these layers together"
    return f"already {zeros / size:.1%} of {whose} are zero"


def _same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.size > 1 and np.array_equal(a, b)


def skipped(method: Method, layer: str, reason: str) -> Change:
    """Return the change of a layer that stays as it is."""
    return Change(method=type(method).__name__, layer=layer, status="skipped", reason=reason)


def done(method: Method, layer: str, mask: NDArray[np.bool_], **detail: float) -> Change:
    """Return the change of a layer that became sparse, with its share of zeros and number of weights."""
    numbers: dict[str, float | int | str] = {
        "sparsity": round(1 - float(mask.mean()), 6),
        "weights": mask.size,
        **{name: round(value, 6) for name, value in detail.items()},
    }
    return Change(method=type(method).__name__, layer=layer, status="done", detail=numbers)


def matrices(candidate: Candidate, order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weight as `[groups, out / groups, columns]` in double precision, columns in an order."""
    weight = candidate.weight.astype(np.float64)
    return weight.reshape(candidate.groups, -1, candidate.columns)[:, :, order]


def unpacked(candidate: Candidate, parts: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    """Return what `matrices` made in the shape of the weight again."""
    back = np.empty_like(parts)
    back[:, :, order] = parts
    return back.reshape(candidate.weight.shape)


def keep_masks(model: Model, context: Context, masks: dict[str, NDArray[np.bool_]]) -> None:
    """Have the backend remember masks by layer, where it can: training then leaves zeros zero."""
    if isinstance(context.backend, MaskBackend) and masks:
        context.backend.set_masks(model, {f"{layer}.weight": mask for layer, mask in masks.items()})
