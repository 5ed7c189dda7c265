"""Rules of operators that move whole axes: reshapes, transpositions, joins, repetitions, padding."""

from __future__ import annotations

import numpy as np
import torch

from penjing.arrays.structure.labels import Labels, joined, on_axis, reshaped, varying
from penjing.backends.torch.graph.capture import is_dynamic
from penjing.backends.torch.graph.steps import Rule, Step, Value, agree, part


def reshape(step: Step) -> Value:
    """Follow labels: they repeat where axes merge, and vary on all axes that one splits into."""
    x: Value = step.args[0]
    if x.shape == step.shape:
        return x
    data = None if x.data is None else x.data.reshape(step.shape)
    value = step.value([reshaped(f, x.shape, step.shape) for f in x.factors], weight=x.weight)
    return Value(value.shape, value.factors, weight=x.weight, data=data)


def _permuted(step: Step, order: list[int]) -> Value:
    x = step.args[0]
    return Value(step.shape, tuple(f.transpose(order) for f in x.factors), weight=x.weight)


def permute(step: Step) -> Value:
    """Reorder axes."""
    rank = len(step.shape)
    return _permuted(step, [axis % rank for axis in step.arg(1, "dims")])


def transpose(step: Step) -> Value:
    """Exchange two axes."""
    order = list(range(len(step.shape)))
    if order:
        a, b = step.arg(1, "dim0"), step.arg(2, "dim1")
        order[a], order[b] = order[b], order[a]
    return _permuted(step, order)


def turn(step: Step) -> Value:
    """Reverse the axes of a matrix (`t`, `numpy_T`)."""
    return _permuted(step, list(reversed(range(len(step.shape)))))


def turn_matrices(step: Step) -> Value:
    """Exchange the last two axes (`mT`, `adjoint`)."""
    *batches, rows, columns = range(len(step.shape))
    return _permuted(step, [*batches, columns, rows])


def movedim(step: Step) -> Value:
    """Move axes to new places."""
    rank = len(step.shape)
    given, places = step.arg(1, "source"), step.arg(2, "destination")
    sources = [axis % rank for axis in (given if isinstance(given, list | tuple) else [given])]
    targets = [axis % rank for axis in (places if isinstance(places, list | tuple) else [places])]
    rest = [axis for axis in range(rank) if axis not in sources]
    order = [-1] * rank
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    return _permuted(step, [axis if axis >= 0 else rest.pop(0) for axis in order])


def concatenate(step: Step) -> Value:
    """Join labels along one axis; the other axes belong together."""
    parts = [p for p in step.args[0] if len(p.shape) == len(step.shape)]
    return _joined(step, parts, step.arg(1, "dim", 0) % len(step.shape))


def stack(step: Step) -> Value:
    """A new axis over tensors whose axes belong together."""
    axis = step.arg(1, "dim", 0) % len(step.shape)
    parts = [
        Value(
            (*p.shape[:axis], 1, *p.shape[axis:]),
            tuple(np.expand_dims(f, axis) for f in p.factors),
            weight=p.weight,
        )
        for p in step.args[0]
    ]
    return _joined(step, parts, axis)


def _joined(step: Step, parts: list[Value], axis: int) -> Value:
    rank, reason = len(step.shape), "is joined with a tensor whose channels are fixed"
    others = [part(_without(p, axis), range(rank), rank) for p in parts]
    factors = list(agree(step, others, reason))
    crossing = [f for p in parts for f in p.factors if f.shape[axis] > 1]
    if crossing:
        axes = sorted({axis, *(a for f in crossing for a in varying(f))})
        # Labels that vary over other axes too say more than those that agree on these axes alone.
        factors = [f for f in factors if not set(axes).intersection(varying(f))]
        none = np.full((1,) * rank, -1, np.int64)
        factors.append(joined([(_most(p, axes, none), p.shape) for p in parts], axis, axes))
    return step.value(factors, weight=all(p.weight for p in parts))


def _without(value: Value, axis: int) -> Value:
    """Return a value seen on the other axes only."""
    shape = tuple(1 if a == axis else n for a, n in enumerate(value.shape))
    return Value(shape, tuple(f for f in value.factors if f.shape[axis] == 1))


def _most(value: Value, axes: list[int], none: Labels) -> Labels:
    """Return the factor of a value that says most about some axes."""
    found = [f for f in value.factors if set(axes).intersection(varying(f))]
    return max(found, key=lambda f: len(varying(f)), default=none)


def expand(step: Step) -> Value:
    """Repeat axes of size 1: there may be as many copies as what they meet has channels."""
    x, rank = step.args[0], len(step.shape)
    new = (1,) * (rank - len(x.shape))
    sizes = step.node.meta["val"].shape
    copies = [
        on_axis(step.coupling.fresh(n, (step.node.name, axis)), axis, rank)
        for axis, n in enumerate(step.shape)
        if n > 1 and (new + x.shape)[axis] == 1 and not _is_batch(sizes[axis])
    ]
    return step.value([*(f.reshape(new + f.shape) for f in x.factors), *copies], weight=x.weight)


def _is_batch(size: int | torch.SymInt) -> bool:
    """Tell whether a size is that of the batch itself, no multiple of it (batch and heads in one axis)."""
    return isinstance(size, torch.SymInt) and is_dynamic(size) and bool(size.node.expr.is_symbol)


def repeat(step: Step) -> Value:
    """Lay copies of a tensor side by side; channels repeat with them (`repeat`, `tile`)."""
    x, new = step.args[0], len(step.shape) - len(step.args[0].shape)
    times = [n // m for n, m in zip(step.shape, (1,) * new + x.shape, strict=True)]
    wide = [f.reshape((1,) * new + f.shape) for f in x.factors]
    tiles = [[n if f.shape[axis] > 1 else 1 for axis, n in enumerate(times)] for f in wide]
    return step.value([np.tile(f, tile) for f, tile in zip(wide, tiles, strict=True)], weight=x.weight)


def repeat_interleave(step: Step) -> Value:
    """Repeat every index of an axis."""
    x, times, axis = step.args[0], step.args[1], step.arg(2, "dim")
    if not isinstance(times, int) or axis is None:
        left = step.freeze_axes(x, range(len(x.shape)), "is repeated a varying number of times")
        return step.value(left)
    return step.value([np.repeat(f, times, axis) if f.shape[axis] > 1 else f for f in x.factors])


def flip(step: Step) -> Value:
    """Turn axes around; what is left of the channels turns around in the same way."""
    x, rank = step.args[0], len(step.shape)
    axes = [axis % rank for axis in step.arg(1, "dims")]
    return Value(step.shape, tuple(np.flip(f, tuple(axes)) for f in x.factors), weight=x.weight)


def roll(step: Step) -> Value:
    """Shift positions; channels that shift are frozen."""
    x, axes = step.args[0], step.arg(2, "dims", [])
    return step.value(step.freeze_axes(x, axes or range(len(x.shape)), "is shifted along its channels"))


def pad(step: Step) -> Value:
    """Pad channels with a constant: the new ones are channels that no tensor makes."""
    x, amounts = step.args[0], step.arg(1, "pad")
    mode = step.arg(2, "mode", "constant")
    # The third argument of constant_pad_nd is a number.
    constant = mode == "constant" or not isinstance(mode, str)
    rank, factors = len(x.shape), list(x.factors)
    for number in range(len(amounts) // 2):
        axis = rank - 1 - number
        sides = amounts[2 * number : 2 * number + 2]
        hit = next((f for f in factors if f.shape[axis] > 1), None)
        if list(sides) == [0, 0] or hit is None:
            continue
        rest = [f for f in factors if f is not hit]
        if not constant or min(sides) < 0:
            step.freeze(hit, "is padded with other channels or cropped")
            factors = rest
        else:
            factors = [*rest, _padded(step, hit, axis, sides)]
    return step.value(factors)


def _padded(step: Step, factor: Labels, axis: int, sides: list[int]) -> Labels:
    ends = []
    for side, length in enumerate(sides):
        shape = tuple(length if a == axis else n for a, n in enumerate(factor.shape))
        if varying(factor) == (axis,):
            atoms = step.coupling.fresh(length, (step.node.name, axis, side))
            ends.append(on_axis(atoms, axis, factor.ndim))
        else:
            ends.append(np.full(shape, -1, np.int64))
    return np.concatenate([ends[0], factor, ends[1]], axis)


def pixel_shuffle(step: Step) -> Value:
    """Channels become pixels: the ones that make the pixels of one channel belong together."""
    x, factor = step.args[0], step.args[1]
    *batch, channels, height, width = x.shape
    split = (*batch, channels // factor**2, factor, factor, height, width)
    factors = []
    for f in x.factors:
        wide = reshaped(f, x.shape, split)
        rank = wide.ndim
        wide = step.tied(wide, (rank - 3, rank - 4), "makes pixels of one channel")
        factors.append(wide.reshape([*wide.shape[: len(batch) + 1], *wide.shape[-2:]]))
    return step.value(factors)


def pixel_unshuffle(step: Step) -> Value:
    """Pixels become channels: every channel repeats."""
    x, factor = step.args[0], step.args[1]
    left = step.freeze_axes(x, (-1, -2), "is not its channel axis")
    return step.value([np.repeat(f, factor**2, -3) if f.shape[-3] > 1 else f for f in left])


def unfold_image(step: Step) -> Value:
    """Windows of an image as columns (`im2col`): every channel repeats for the pixels of a window."""
    x = step.args[0]
    left = step.freeze_axes(x, (-1, -2), "is not its channel axis")
    times = step.shape[-2] // x.shape[-3]
    return step.value([(np.repeat(f, times, -3) if f.shape[-3] > 1 else f)[..., 0] for f in left])


def fold_image(step: Step) -> Value:
    """Columns become windows of an image again (`col2im`): all pixels of a window are one channel."""
    x = step.args[0]
    left = step.freeze_axes(x, (-1,), "is not its channel axis")
    channels, factors = step.shape[-3], []
    for f in left:
        if f.shape[-2] > 1:
            wide = f.reshape(*f.shape[:-2], channels, -1, 1)
            factors.append(step.tied(wide, [wide.ndim - 2], "makes pixels of one channel"))
        else:
            factors.append(f[..., None])
    return step.value(factors)


def unfold(step: Step) -> Value:
    """Windows along an axis become a last axis."""
    x = step.args[0]
    left = step.freeze_axes(x, [step.args[1]], "is not its channel axis")
    return step.value([f[..., None] for f in left])


def as_complex(step: Step) -> Value:
    """Pairs of the last axis become complex numbers, so that both go together."""
    factors = []
    for f in step.args[0].factors:
        factors.append(step.tied(f, [f.ndim - 1], "is half of a complex number")[..., 0])
    return step.value(factors)


def as_real(step: Step) -> Value:
    """Complex numbers become pairs on a new last axis."""
    return step.value([f[..., None] for f in step.args[0].factors])


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "view_as",
            "reshape_as",
        ),
        reshape,
    ),
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "numpy_T"), turn),
    **dict.fromkeys(("mT", "adjoint", "matrix_H"), turn_matrices),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
    "stack": stack,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    "flip": flip,
    "roll": roll,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": unfold_image,
    "col2im": fold_image,
    "unfold": unfold,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
}
