"""Rules of operators that move channels without mixing them: reshapes, slices, joins, padding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from penjing.arrays.coupling import Labels, fixed
from penjing.backends.torch.capture import varies
from penjing.backends.torch.steps import Rule, Step, Value


def reshape(step: Step) -> Value:
    """Follow channels through a reshape: they repeat where axes merge, and tie up where one splits."""
    x = step.args[0]
    dynamic = [varies(d) for d in step.node.args[0].meta["val"].shape]
    before = tuple(map(len, x.dims))
    dims: list[Labels] = []
    for axes, shape in segments(before, step.shape):
        if len(axes) == 1 and len(shape) == 1:
            dims.append(x.dims[axes[0]])
            continue
        merged = _merge(step, [x.dims[a] for a in axes], any(dynamic[a] for a in axes))
        dims.extend(_split(step, merged, shape))
    return Value(tuple(dims), x.source if tuple(map(len, dims)) == before else None)


def segments(
    before: tuple[int, ...], after: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut two shapes of one size into the smallest runs of equal product.

    Yields:
        Axes of `before`, and the sizes of `after` that they become.

    >>> list(segments((3, 8, 4, 4), (3, 128)))
    [((0,), (3,)), ((1, 2, 3), (128,))]
    >>> list(segments((3, 8), (3, 8, 1, 1)))
    [((0,), (3,)), ((1,), (8, 1, 1))]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        only_ones_left = {1} >= {*before[i:], *after[j:]}
        if only_ones_left and len(before) - i != len(after) - j:
            i, j = len(before), len(after)
        yield tuple(range(start_i, i)), after[start_j:j]


def _merge(step: Step, dims: list[Labels], dynamic: bool) -> Labels:
    channels = [d for d in dims if (d >= 0).any()]
    if len(channels) > 1 or (channels and dynamic):
        for dim in channels:
            step.freeze(dim, "is merged with another axis")
        return fixed(math.prod(map(len, dims)))
    shape = [len(d) for d in dims]
    merged = fixed(math.prod(shape)).reshape(shape)
    for axis, dim in enumerate(dims):
        if (dim >= 0).any():
            merged = np.broadcast_to(np.expand_dims(dim, [a for a in range(len(dims)) if a != axis]), shape)
    return merged.reshape(-1).copy()


def _split(step: Step, labels: Labels, shape: tuple[int, ...]) -> list[Labels]:
    """Give the labels to one of the new axes: where they vary, else to the first, tied along the others."""
    if not shape:
        step.freeze(labels, "is squeezed away")
        return []
    whole = labels.reshape(shape)
    wide = [axis for axis, n in enumerate(shape) if n > 1] or [0]
    exact = (axis for axis in wide if _varies_only(whole, axis))
    target = next(exact, wide[0])
    first = np.moveaxis(whole, target, 0).reshape(shape[target], -1)
    for column in first.T[1:]:
        step.unite(first[:, 0], column, "is split into several axes")
    return [first[:, 0].copy() if axis == target else fixed(n) for axis, n in enumerate(shape)]


def _varies_only(whole: Labels, axis: int) -> bool:
    lines = np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)
    return bool((lines == lines[:, :1]).all())


def permute(step: Step) -> Value:
    """Reorder axes."""
    x = step.args[0]
    order = step.arg(1, "dims") or range(len(x.dims))
    dims = tuple(x.dims[a] for a in order)
    return Value(dims, x.source if list(order) == list(range(len(dims))) else _transposed(x))


def transpose(step: Step) -> Value:
    """Exchange two axes."""
    x, dims = step.args[0], list(step.args[0].dims)
    a, b = step.arg(1, "dim0"), step.arg(2, "dim1")
    dims[a], dims[b] = dims[b], dims[a]
    return Value(tuple(dims), _transposed(x))


def turn(step: Step) -> Value:
    """Reverse the axes of a matrix (`t`, `numpy_T`, `mT`)."""
    x = step.args[0]
    return Value(tuple(reversed(x.dims)), _transposed(x)) if len(x.dims) <= 2 else _give_up(step)


def _transposed(x: Value) -> tuple[str, str] | None:
    return x.source if len(x.dims) == 2 else None


def _give_up(step: Step) -> Value:
    for dim in step.args[0].dims:
        step.freeze(dim, "is reordered")
    return Value(tuple(fixed(n) for n in step.shape))


def concatenate(step: Step) -> Value:
    """Join labels along one axis; the other axes belong together."""
    parts = [part for part in step.args[0] if len(part.dims) == len(step.shape)]
    axis = step.arg(1, "dim", 0) % len(step.shape)
    dims = []
    for i in range(len(step.shape)):
        labels = [part.dims[i] for part in parts]
        if i == axis:
            dims.append(np.concatenate(labels))
            continue
        for other in labels[1:]:
            step.unite(labels[0], other, "is joined with a tensor whose channels are fixed")
        dims.append(labels[0])
    return Value(tuple(dims))


def stack(step: Step) -> Value:
    """A new axis over tensors whose axes belong together."""
    parts, axis = step.args[0], step.arg(1, "dim", 0) % len(step.shape)
    for part in parts[1:]:
        for first, other in zip(parts[0].dims, part.dims, strict=True):
            step.unite(first, other, "is stacked with a tensor whose channels are fixed")
    dims = list(parts[0].dims)
    dims.insert(axis, fixed(len(parts)))
    return Value(tuple(dims))


def expand(step: Step) -> Value:
    """Repeat axes of size 1."""
    x, missing = step.args[0], len(step.shape) - len(step.args[0].dims)
    dims = [fixed(n) for n in step.shape[:missing]]
    for labels, length in zip(x.dims, step.shape[missing:], strict=True):
        dims.append(labels if len(labels) == length else fixed(length))
        if len(labels) != length:
            step.freeze(labels, "is broadcast over channels")
    return Value(tuple(dims))


def repeat(step: Step) -> Value:
    """Tile axes."""
    x, times = step.args[0], step.arg(1, "repeats")
    dims = [fixed(1)] * (len(times) - len(x.dims)) + list(x.dims)
    if any(isinstance(t, torch.fx.Node) for t in times):
        return _give_up(step)
    return Value(tuple(np.tile(d, t) for d, t in zip(dims, times, strict=True)))


def slicing(step: Step) -> Value:
    """Slice labels as the values are sliced; a stride along channels freezes them."""
    x, axis = step.args[0], step.arg(1, "dim", 0) % len(step.args[0].dims)
    start, stop, stride = step.arg(2, "start") or 0, step.arg(3, "end"), step.arg(4, "step", 1)
    symbolic = not all(isinstance(n, int | None) for n in (start, stop))
    dims = list(x.dims)
    if stride != 1 or symbolic:
        step.freeze(dims[axis], "is sliced with a stride or a varying bound")
        dims[axis] = fixed(step.shape[axis])
    else:
        dims[axis] = dims[axis][start:stop]
    return Value(tuple(dims))


def narrow(step: Step) -> Value:
    """Slice by start and length; the rewriter does not know it, so channels are frozen."""
    x, axis = step.args[0], step.arg(1, "dim") % len(step.args[0].dims)
    dims = list(x.dims)
    step.freeze(dims[axis], "is narrowed")
    dims[axis] = fixed(step.shape[axis])
    return Value(tuple(dims))


def select(step: Step) -> Value:
    """Take one index of an axis."""
    x = step.args[0]
    axis = step.arg(1, "dim") % len(x.dims)
    step.freeze(x.dims[axis], "is indexed by a number")
    return Value(tuple(d for i, d in enumerate(x.dims) if i != axis))


def unbind(step: Step) -> list[Value]:
    """Take an axis apart."""
    x = step.args[0]
    axis = step.arg(1, "dim", 0) % len(x.dims)
    step.freeze(x.dims[axis], "is taken apart")
    return [Value(tuple(d for i, d in enumerate(x.dims) if i != axis)) for _ in step.shape]


def split(step: Step) -> list[Value]:
    """Cut one axis into runs (`split`, `split_with_sizes`, `chunk`)."""
    x = step.args[0]
    axis = step.arg(2, "dim", 0) % len(x.dims)
    bounds = np.cumsum([shape[axis] for shape in step.shape])[:-1]
    pieces = np.split(x.dims[axis], bounds)
    return [Value((*x.dims[:axis], piece, *x.dims[axis + 1 :])) for piece in pieces]


def pad(step: Step) -> Value:
    """Pad channels with a constant: the new ones are channels that no tensor makes."""
    x, amounts = step.args[0], step.arg(1, "pad")
    mode = step.arg(2, "mode", "constant")
    # The third argument of constant_pad_nd is a number.
    constant = mode == "constant" or not isinstance(mode, str)
    dims = list(x.dims)
    for number in range(len(amounts) // 2):
        axis = len(dims) - 1 - number
        left, right = amounts[2 * number : 2 * number + 2]
        if left == right == 0:
            continue
        if not constant or left < 0 or right < 0 or not (dims[axis] >= 0).any():
            step.freeze(dims[axis], "is padded with other channels or cropped")
            dims[axis] = fixed(step.shape[axis])
        else:
            fresh = step.coupling.fresh
            dims[axis] = np.concatenate([fresh(left), dims[axis], fresh(right)])
    return Value(tuple(dims))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze",
                     "view_as", "reshape_as"), reshape),
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "numpy_T"), turn),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
    "stack": stack,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "repeat": repeat,
    "slice": slicing,
    "narrow": narrow,
    "select": select,
    "unbind": unbind,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
}  # fmt: skip
