"""Turn what the user's data gives into arrays, or refuse it where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused


def attempt(call: Callable[[], Any], place: str) -> Any:
    """Call the user's code; what it raises is refused with the place."""
    try:
        return call()
    except Refused:
        raise
    except Exception as error:  # the user's data may raise anything; where it did is what helps
        raise Refused(
            "every example must be readable",
            value=f"{type(error).__name__}: {error}",
            place=place,
            fix="repair or leave out this example",
        ) from error


def as_array(value: Any, place: str) -> NDArray[Any]:
    """Return an array of numbers or text from an array, a tensor of any device, a list or a scalar."""
    if hasattr(value, "detach"):
        value = attempt(lambda: value.detach().cpu().numpy(), place)
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "biufUS":
        raise Refused(
            "the data must be arrays of numbers of one shape",
            place=place,
            value=f"{type(value).__name__} {array.dtype}",
            fix="convert it to a NumPy array or tensor first",
        )
    return array


def as_input(value: Any, place: str) -> NDArray[Any]:
    """Return a batch of numbers; float64 becomes float32, which models compute in."""
    array = as_array(value, place)
    if array.dtype.kind in "US" or array.ndim == 0:
        raise Refused(
            "must be an array of numbers with a batch axis",
            place=place,
            value=f"{array.dtype} {array.shape}",
            fix="encode text as numbers first",
        )
    return array.astype(np.float32) if array.dtype == np.float64 else array


def as_target(value: Any, labels: bool, place: str) -> NDArray[Any]:
    """Return a batch of targets; where labels are asked for, class indices `[n]` as int64."""
    array = as_array(value, place)
    if array.dtype.kind in "US":
        raise _bad_labels(f"text such as {str(array.flat[0])[:20]!r}", place, "number the classes from 0")
    if array.ndim == 0:
        raise Refused(
            "must have a batch axis",
            value=f"{array.dtype} {array.shape}",
            place=place,
            fix="give one target for each example: an array of shape [n, ...]",
        )
    if not labels:
        return array
    if (
        array.ndim == 2
        and array.shape[1] > 1
        and np.isin(array, (0, 1)).all()
        and (array.sum(axis=1) == 1).all()
    ):
        raise _bad_labels(f"one-hot {array.shape}", place, "pass targets.argmax(axis=1)")
    if array.ndim != 1:
        raise _bad_labels(f"shape {array.shape}", place, "pass one class index for each example: shape [n]")
    if array.dtype.kind == "f":
        raise _bad_labels(str(array.dtype), place, "pass targets.astype(numpy.int64)")
    return array.astype(np.int64)


def _bad_labels(value: str, place: str, fix: str) -> Refused:
    return Refused("the labels must be class indices", value=value, place=place, fix=fix)


def refuse_not_finite(x: NDArray[Any], place: str) -> None:
    """Refuse NaN and infinities, counted, with the first example that has one."""
    finite = np.isfinite(x)
    if finite.all():
        return
    bad = ~finite.reshape(len(x), -1).all(axis=1)
    count = f"{int((~finite).sum())} values NaN or infinite in {int(bad.sum())} of {len(x)} examples"
    raise Refused(
        "the data must be finite",
        value=count,
        place=f"{place}, first in example {int(bad.argmax())}",
        fix="repair or leave out these examples",
    )
