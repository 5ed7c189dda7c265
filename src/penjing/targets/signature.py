"""What a delivered model takes, as data, and the check of a call against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.core.errors import Refused


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, NumPy dtype and shape; None is a dimension that may vary."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def spec_from_json(data: dict[str, Any]) -> TensorSpec:
    """Rebuild a spec from what `to_json` wrote."""
    return TensorSpec(str(data["name"]), str(data["dtype"]), tuple(data["shape"]))


def find_fixed_batch(specs: Sequence[TensorSpec]) -> int | None:
    """Return the batch that the inputs insist on, or None where any batch goes."""
    sizes = {spec.shape[0] for spec in specs if spec.shape}
    sizes.discard(None)
    return min(size for size in sizes if size is not None) if sizes else None


class Guard:
    """Checks the inputs of each call; a signature that passed once costs a set look-up afterwards."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self._passed: set[tuple[Any, ...]] = set()

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raise `Refused`, naming the input, unless number, dtypes and shapes fit the specs."""
        signature = tuple((getattr(x, "shape", None), getattr(x, "dtype", None)) for x in inputs)
        if signature not in self._passed:
            check_inputs(inputs, self.specs)
            self._passed.add(signature)


def check_inputs(inputs: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Check arrays against specs.

    Raises:
        Refused: wrong number of inputs, no array, a dtype or a shape that does not fit, or batches of
            different sizes; the input is named.
    """
    names = ", ".join(spec.name for spec in specs)
    if len(inputs) != len(specs):
        raise Refused(
            f"must be {len(specs)}, as many as the model has",
            value=len(inputs),
            place="inputs",
            fix=f"pass {names}, in this order",
        )
    for array, spec in zip(inputs, specs, strict=True):
        place = f"input {spec.name!r}"
        if not isinstance(array, np.ndarray):
            raise Refused(
                "must be a NumPy array",
                value=type(array).__name__,
                place=place,
                fix="convert it with numpy.asarray",
            )
        if array.dtype != np.dtype(spec.dtype):
            raise Refused(
                f"must have dtype {spec.dtype}",
                value=array.dtype,
                place=place,
                fix=f"convert it with .astype('{spec.dtype}')",
            )
        if not _fits(array.shape, spec.shape):
            raise Refused(
                f"must have the shape {_say(spec.shape)}",
                value=array.shape,
                place=place,
                fix="reshape it, or give the examples that the model was delivered for",
            )
    batches = {x.shape[0] for x, spec in zip(inputs, specs, strict=True) if spec.shape}
    if len(batches) > 1:
        raise Refused(
            "must have as many examples each",
            value=", ".join(map(str, sorted(batches))),
            place=f"inputs {names}",
            fix="give one array of each input for the same examples",
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or w == s for s, w in zip(shape, wanted, strict=True))


def _say(shape: tuple[int | None, ...]) -> str:
    words = ["batch" if i == 0 and d is None else "any" if d is None else str(d) for i, d in enumerate(shape)]
    return f"({', '.join(words)})"
