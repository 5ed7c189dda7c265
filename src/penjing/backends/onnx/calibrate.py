"""Ranges of a float graph's tensors over calibration data, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from penjing.arrays.observers.observer import Observer, ObserverKind
from penjing.arrays.quantization import ACTIVATIONS
from penjing.backends.onnx.backend import with_outputs
from penjing.backends.onnx.model import as_feed, graph_inputs, open_session, run_session
from penjing.core.backend import Arrays
from penjing.core.errors import Refused

LARGEST_BATCH = 64
BATCH_BYTES = 2**28
"""Tensors watched at once take at most this much memory."""


def calibration_batches(split: Any, examples: int, size: int, seed: int) -> Iterator[Arrays]:
    """Yield the inputs of the first examples of a shuffled split, in batches.

    Raises:
        Refused: the split is empty.
    """
    if len(split) == 0:
        raise Refused("calibration has examples", value=0, place="task.train", fix="give training data")
    left = examples
    for inputs, _ in split.batches(size, seed):
        taken = tuple(array[:left] for array in inputs)
        yield taken
        left -= len(taken[0])
        if left <= 0:
            return


def batch_limit(proto: Any, limit: int) -> int:
    """Return 1 for a model that declares a batch of one, else the limit."""
    names = graph_inputs(proto)
    shapes = [value.type.tensor_type.shape.dim for value in proto.graph.input if value.name in names]
    return 1 if any(dims and dims[0].dim_value == 1 for dims in shapes) else limit


class Watcher:
    """A float model with some of its tensors as outputs."""

    def __init__(self, proto: Any, names: Sequence[str]) -> None:
        self.names = list(names)
        self._limit = batch_limit(proto, LARGEST_BATCH)
        self._given = set(graph_inputs(proto))
        self._session = open_session(with_outputs(proto, self.names), "basic")

    def values(self, inputs: Arrays) -> dict[str, Any]:
        """Return the watched tensors for one batch, by name."""
        feed = as_feed(self._session, inputs)
        wanted = [name for name in self.names if name not in self._given]
        found = dict(zip(wanted, run_session(self._session, wanted, feed), strict=True)) if wanted else {}
        return {name: feed[name] if name in self._given else found[name] for name in self.names}

    def batch_size(self, example: Arrays) -> int:
        """Return how many examples at once keep the watched tensors within `BATCH_BYTES`."""
        size = sum(value.nbytes for value in self.values(example).values())
        return int(np.clip(BATCH_BYTES // max(size, 1), 1, self._limit))


def ranges(
    proto: Any, names: Sequence[str], split: Any, observer: ObserverKind, examples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return the range of every named tensor over calibration data, walked once.

    Raises:
        Refused: no data, NaN or infinite values, or the inputs are one constant.
    """
    watcher = Watcher(proto, names)
    size = watcher.batch_size(split.example()) if len(split) else 1
    seen = {name: Observer(observer, ACTIVATIONS) for name in names}
    given: set[float] = set()
    for inputs in calibration_batches(split, examples, size, seed):
        given.update(float(end) for array in inputs if array.size for end in (array.min(), array.max()))
        for name, value in watcher.values(inputs).items():
            try:
                seen[name].add(value)
            except Refused as error:
                raise Refused(
                    error.rule, value=error.value, place=f"calibration, tensor {name!r}", fix=error.fix
                ) from None
    if len(given) < 2:
        raise Refused(
            "calibration inputs vary",
            value=f"only {given or 'nothing'}",
            place="task.train",
            fix="calibrate on real examples",
        )
    found = {name: entry.range() for name, entry in seen.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
