"""The inputs of layers on calibration data: in which order layers depend on each other, and their moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.patches import windows
from penjing.arrays.sparsity.gram import Gram
from penjing.core.backend import Arrays, Backend, Layer
from penjing.core.context import Context
from penjing.core.data.split import Split
from penjing.core.errors import Refused
from penjing.core.task import Batch
from penjing.core.value import Model

ROWS = 2**18
"""Observations of a layer that its moments are taken over, at most about so many: drawn positions of each
example where there are more."""
CHUNK_BYTES = 2**26
GRAM_BYTES = 2**31
"""Second moments held at a time; a layer that needs more by itself is left out."""


class Drawn(Sequence[Batch]):
    """Batches of drawn examples of a split, copied from it each time they are asked for."""

    def __init__(self, split: Split, index: NDArray[np.int64], batch_size: int) -> None:
        self._split = split
        self._parts = [index[start : start + batch_size] for start in range(0, len(index), batch_size)]

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, place: int) -> Batch: ...

    @overload
    def __getitem__(self, place: slice) -> list[Batch]: ...

    def __getitem__(self, place: int | slice) -> Batch | list[Batch]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        index = self._parts[place]
        return tuple(x[index] for x in self._split.inputs), self._split.targets[index]


def calibration_batches(context: Context, examples: int, batch_size: int) -> Sequence[Batch]:
    """Return batches of training inputs, `examples` of them or all there are, drawn by the context's seed.

    Those of arrays are copied when they are asked for, so that arrays that lie in a file stay there.

    Raises:
        Refused: there are none.
    """
    train = context.task.train
    if isinstance(train, Split) and len(train):
        order = np.random.default_rng(context.seed).permutation(len(train))
        return Drawn(train, order[:examples], min(batch_size, examples))
    batches: list[Batch] = []
    left = examples
    for inputs, targets in train.batches(min(batch_size, examples), context.seed):
        batches.append((tuple(x[:left] for x in inputs), targets[:left]))
        left -= len(batches[-1][1])
        if left <= 0:
            break
    if left == examples:
        raise no_examples()
    return batches


def no_examples() -> Refused:
    """Return the refusal of a method that needs data where there are none."""
    return Refused(
        "must have examples to calibrate on",
        value=0,
        place="task.train",
        fix="give training data, labels are not used",
    )


def check_calibration_data(batches: Sequence[Batch]) -> None:
    """Refuse inputs of a model that say nothing about it.

    Raises:
        Refused: an input is NaN or infinite, or all values of all inputs are the same.
    """
    ends = set()
    for inputs, _ in batches:
        for number, x in enumerate(inputs):
            if not np.isfinite(x).all():
                raise Refused(
                    "must be finite",
                    value="NaN or infinite values",
                    place=f"task.train, input {number}",
                    fix="remove or replace these values in the training data",
                )
            ends |= {x.min().item(), x.max().item()} if x.size else set()
    if len(ends) < 2:
        raise Refused(
            "must vary from example to example",
            value=f"only the value {next(iter(ends), 'of nothing')}",
            place="task.train",
            fix="give examples as the model will see them",
        )


def why_unobservable(layer: Layer) -> str:
    """Say why the second moments of a layer's inputs cannot be had; empty where they can."""
    size = gram_bytes(layer)
    if layer.kind != "linear" and layer.window is None:
        return "its input is not read as patches"
    if layer.kind == "linear" and len(layer.shapes["weight"]) != 2:
        return "its weight is no matrix"
    if size > GRAM_BYTES:
        return (
            f"the moments of its inputs take {size / 2**30:.1f} GiB, more than {GRAM_BYTES / 2**30:.1f} GiB"
        )
    return ""


def split_by_memory(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Split layers so that the moments of each part fit into `GRAM_BYTES` together, as far as they can."""
    parts: list[list[Layer]] = []
    held = GRAM_BYTES
    for layer in layers:
        held += gram_bytes(layer)
        if held > GRAM_BYTES:
            parts.append([])
            held = gram_bytes(layer)
        parts[-1].append(layer)
    return parts


def why_not_called(backend: Backend, model: Model, layers: Sequence[str], inputs: Arrays) -> dict[str, str]:
    """Return for each layer that cannot be observed the reason."""
    reasons = {}
    for layer in layers:
        try:
            _inputs(backend, model, [layer], inputs)
        except Refused as refusal:
            reasons[layer] = f"cannot be observed: `{refusal.rule}` does not hold"
    return reasons


def execution_levels(
    backend: Backend, model: Model, layers: Sequence[str], inputs: Arrays, seed: int
) -> list[list[str]]:
    """Return layers in the order in which data reach them, those together that do not feed each other.

    Found by trial, whatever the framework: each layer's weight is disturbed once, and the layers whose input
    then differs come after it. Costs one run on `inputs` for each layer.

    Args:
        backend, model: each weight is put back after its trial.
        layers: names, in the order that decides where the data do not.
        inputs: a batch of few examples.
        seed: of the disturbances.
    """
    rng, base = np.random.default_rng(seed), _inputs(backend, model, layers, inputs)
    before: dict[str, set[str]] = {layer: set() for layer in layers}
    for layer in layers:
        weight = backend.read(model, layer)["weight"]
        noise = rng.uniform(0.5, 1.5, weight.shape).astype(weight.dtype)
        backend.write(model, layer, {"weight": weight * noise})
        moved = _inputs(backend, model, layers, inputs)
        backend.write(model, layer, {"weight": weight})
        for other in layers:
            if other != layer and not np.array_equal(base[other], moved[other]):
                before[other].add(layer)
    return _levels(before)


def _levels(before: dict[str, set[str]]) -> list[list[str]]:
    """Return names in levels, each after all that come before it; a circle is broken at its first name."""
    left, levels = list(before), []
    while left:
        ready = [name for name in left if not before[name] & set(left)] or left[:1]
        levels.append(ready)
        left = [name for name in left if name not in ready]
    return levels


def _inputs(backend: Backend, model: Model, layers: Sequence[str], inputs: Arrays) -> dict[str, NDArray[Any]]:
    batch: Batch = (inputs, np.zeros(len(inputs[0]), np.int64))
    seen = next(iter(backend.observe(model, layers, iter([batch]))))
    return {layer: x for layer, (x, _) in seen.items()}


def input_grams(
    backend: Backend,
    model: Model,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    seed: int,
    dense: Model | None = None,
) -> dict[str, Gram]:
    """Return the second moments of the inputs of layers, in one pass over the batches.

    Memory: see `Gram`, for each layer, beside the layers' inputs for one batch.

    Args:
        backend, model, layers: what is observed.
        batches: inputs of the model.
        seed: of the positions drawn.
        dense: a model with the same layers, whose inputs of them are the wanted ones.

    Raises:
        Refused: an input is NaN or infinite.
    """
    grams = {layer.name: _empty(layer) for layer in layers}
    examples = sum(len(targets) for _, targets in batches)
    rng = np.random.default_rng(seed)
    observed = backend.observe(model, list(grams), iter(batches))
    wanted = repeat({}) if dense is None else backend.observe(dense, list(grams), iter(batches))
    for seen, aim in zip(observed, wanted, strict=False):
        for layer in layers:
            inputs = [found[layer.name][0] for found in (seen, aim) if found]
            add_rows(grams[layer.name], layer, inputs, ROWS // examples, rng)
    for name, gram in grams.items():
        if not np.isfinite(gram.total).all():
            raise Refused(
                "must take finite inputs",
                value="NaN or infinite values",
                place=name,
                fix="look for overflow in the layers before it, or leave it out with only('!...', ...)",
            )
    return grams


def gram_bytes(layer: Layer) -> int:
    """Return the memory that the second moments of a layer's inputs take."""
    groups = layer.window.groups if layer.window is not None else 1
    return groups * math.prod(layer.shapes["weight"][1:]) ** 2 * 8


def _empty(layer: Layer) -> Gram:
    groups = layer.window.groups if layer.window is not None else 1
    return Gram(groups, math.prod(layer.shapes["weight"][1:]))


def add_rows(
    gram: Gram, layer: Layer, inputs: Sequence[NDArray[Any]], limit: int, rng: np.random.Generator
) -> None:
    """Add what each output of a layer is computed from.

    Args:
        gram: takes the rows.
        layer: a convolution with its window, or a linear layer.
        inputs: `[n, in, *spatial]` of a convolution, `[n, ..., in]` of a linear layer; then, maybe, the
            wanted ones.
        limit: about so many positions of each example, drawn (at least one).
        rng: of the draw.
    """
    w = layer.window
    views = list(inputs)
    if w is not None:
        views = [windows(x, w.kernel, w.stride, w.padding, w.dilation, w.mode) for x in inputs]
    seen = views[0]
    shape = seen.shape[:-1] if w is None else seen.shape[: inputs[0].ndim - 1]
    total, wanted = math.prod(shape), len(seen) * max(limit, 1)
    chosen = np.arange(total) if total <= wanted else np.sort(rng.choice(total, wanted, replace=False))
    step = max(1, CHUNK_BYTES // (8 * math.prod(seen.shape[len(shape) :])))
    for start in range(0, len(chosen), step):
        index = np.unravel_index(chosen[start : start + step], shape)
        gram.add(*(view[index].reshape(len(index[0]), -1) for view in views))
