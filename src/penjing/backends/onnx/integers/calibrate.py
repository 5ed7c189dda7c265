"""Ranges of a float graph's tensors over calibration data, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.observers.observer import Observer, ObserverKind
from penjing.arrays.quantization import ACTIVATIONS
from penjing.backends.onnx.graph.edit import expose_tensors
from penjing.backends.onnx.graph.index import list_inputs
from penjing.backends.onnx.model import make_feed, open_session, run_session
from penjing.core.backend import Arrays
from penjing.core.errors import Refused
from penjing.core.task import Split

if TYPE_CHECKING:
    from onnx import ModelProto

LARGEST_BATCH = 64
BATCH_BYTES = 2**28
"""Tensors watched at once take at most this much memory."""


def iterate_calibration(split: Split, examples: int, size: int, seed: int) -> Iterator[Arrays]:
    """Yield the inputs of the first `examples` of a shuffled split, in batches of `size`.

    Raises:
        Refused: the split is empty.
    """
    if len(split) == 0:
        raise Refused(
            "must have examples to calibrate on", value=0, place="task.train", fix="give training data"
        )
    left = examples
    for inputs, _ in split.batches(size, seed):
        taken = tuple(array[:left] for array in inputs)
        yield taken
        left -= len(taken[0])
        if left <= 0:
            return


def limit_batch(proto: ModelProto, limit: int) -> int:
    """Return 1 for a model that declares a batch of one, else the limit."""
    names = list_inputs(proto)
    shapes = [value.type.tensor_type.shape.dim for value in proto.graph.input if value.name in names]
    return 1 if any(dims and dims[0].dim_value == 1 for dims in shapes) else limit


class Watcher:
    """A float model with some of its tensors as outputs."""

    def __init__(self, proto: ModelProto, names: Sequence[str]) -> None:
        self.names = list(names)
        self._limit = limit_batch(proto, LARGEST_BATCH)
        self._given = set(list_inputs(proto))
        self._session = open_session(expose_tensors(proto, self.names), "basic")

    def values(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Return the watched tensors for one batch, by name."""
        feed = make_feed(self._session, inputs)
        wanted = [name for name in self.names if name not in self._given]
        found = dict(zip(wanted, run_session(self._session, wanted, feed), strict=True)) if wanted else {}
        return {name: feed[name] if name in self._given else found[name] for name in self.names}

    def batch_size(self, example: Arrays) -> int:
        """Return how many examples at once keep the watched tensors within `BATCH_BYTES`."""
        size = sum(value.nbytes for value in self.values(example).values())
        return int(np.clip(BATCH_BYTES // max(size, 1), 1, self._limit))


def calibrate_ranges(
    proto: ModelProto, names: Sequence[str], split: Split, observer: ObserverKind, examples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return the range of every named tensor over calibration data, walked once.

    Raises:
        Refused: no data, NaN or infinite values, or the inputs are one constant.
    """
    watcher = Watcher(proto, names)
    size = watcher.batch_size(split.example()) if len(split) else 1
    seen = {name: Observer(observer, ACTIVATIONS) for name in names}
    given: set[float] = set()
    for inputs in iterate_calibration(split, examples, size, seed):
        given.update(float(end) for array in inputs if array.size for end in (array.min(), array.max()))
        for name, value in watcher.values(inputs).items():
            try:
                seen[name].add(value)
            except Refused as error:
                raise error.at(f"calibration, tensor {name!r}") from None
    if len(given) < 2:
        raise Refused(
            "calibration inputs must vary",
            value=f"one number only, {given.pop()}" if given else "no number",
            place="task.train",
            fix="calibrate on real examples",
        )
    found = {name: entry.range() for name, entry in seen.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
