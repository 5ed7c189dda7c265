"""Rules of operators that take parts of a tensor: slices, splits, single indices, index tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.structure.labels import Labels, Shape, varying
from penjing.backends.torch.graph.steps import Rule, Step, Value, agree, part


def _taken(step: Step, indices: NDArray[np.int64], axis: int, shape: tuple[int, ...]) -> Value:
    """Take some indices of an axis; what is taken and what is left keep something of their own."""
    x = step.args[0]
    factors: list[Labels] = []
    for f in x.factors:
        if f.shape[axis] > 1:
            f = f.take(indices, axis)
            if varying(f) == (axis,):
                step.coupling.separate(f.reshape(-1))
        factors.append(f)
    return step.value(factors, shape, weight=x.weight)


def slicing(step: Step) -> Value:
    """A range of an axis, with any step."""
    x: Value = step.args[0]
    axis = step.arg(1, "dim", 0) % len(x.shape)
    if x.shape == step.shape:
        return x
    start, stop, stride = (step.arg(i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    if not all(isinstance(n, int | None) for n in (start, stop, stride)):
        return step.value(step.freeze_axes(x, [axis], "is sliced by a size that varies"))
    chosen = np.arange(x.shape[axis])[slice(start, stop, stride)]
    return _taken(step, chosen, axis, step.shape)


def narrow(step: Step) -> Value:
    """A range of an axis by start and length."""
    x: Value = step.args[0]
    start = step.arg(2, "start")
    axis = step.arg(1, "dim") % len(x.shape)
    if x.shape == step.shape:
        return x
    if not isinstance(start, int):
        return step.value(step.freeze_axes(x, [axis], "is sliced by a size that varies"))
    start %= x.shape[axis]
    return _taken(step, np.arange(start, start + step.shape[axis]), axis, step.shape)


def select(step: Step) -> Value:
    """Take one index of an axis."""
    x, index = step.args[0], step.arg(2, "index")
    axis = step.arg(1, "dim") % len(x.shape)
    if not isinstance(index, int):
        return _dropped(step, x, axis, step.freeze_axes(x, [axis], "is indexed by a number that varies"))
    return _dropped(step, x, axis, _indexed(step, x, axis, index))


def _indexed(step: Step, x: Value, axis: int, index: int) -> tuple[Labels, ...]:
    """Return the labels at one index; a channel of its own that is picked by its number stays."""
    factors = []
    for f in x.factors:
        if f.shape[axis] == 1:
            factors.append(f)
        elif varying(f) == (axis,):
            step.freeze(f.take([index], axis), "is indexed by a number")
        else:
            factors.append(f.take([index], axis))
    return tuple(factors)


def _dropped(
    step: Step, x: Value, axis: int, factors: tuple[Labels, ...], shape: Shape | None = None
) -> Value:
    shape = step.shape if shape is None else shape
    return step.value([f.squeeze(axis) for f in factors], shape, weight=x.weight)


def unbind(step: Step) -> list[Value]:
    """Take an axis apart."""
    x = step.args[0]
    axis = step.arg(1, "dim", 0) % len(x.shape)
    return [
        _dropped(step, x, axis, _indexed(step, x, axis, index), shape)
        for index, shape in enumerate(step.shape)
    ]


def split(step: Step) -> list[Value]:
    """Cut one axis into runs (`split`, `split_with_sizes`, `chunk`, `tensor_split`)."""
    x = step.args[0]
    axis = step.arg(2, "dim", 0) % len(x.shape)
    bounds = np.cumsum([0, *(shape[axis] for shape in step.shape)])
    return [
        _taken(step, np.arange(start, stop), axis, shape)
        for start, stop, shape in zip(bounds[:-1], bounds[1:], step.shape, strict=True)
    ]


def glu(step: Step) -> Value:
    """One half of an axis times a gate made of the other half: they belong together."""
    x = step.args[0]
    axis = step.arg(1, "dim", -1) % len(x.shape)
    factors = []
    for f in x.factors:
        if f.shape[axis] > 1:
            f, gate = np.split(f, 2, axis)
            step.unite(f, gate, "its gate is fixed")
        factors.append(f)
    return step.value(factors)


def index_select(step: Step) -> Value:
    """Take indices of an axis from a tensor; where it is a constant, channels follow it."""
    x, index = step.args[0], step.args[2]
    axis = step.args[1] % len(x.shape)
    if index.data is None:
        return step.value(step.freeze_axes(x, [axis], "is indexed by a tensor that varies"))
    return _taken(step, index.data.reshape(-1), axis, step.shape)


def gather(step: Step) -> Value:
    """Choose along one axis, differently for every index of the others: these belong together."""
    x, chosen = step.args[0], step.args[2]
    axis, rank = step.args[1] % max(len(x.shape), 1), len(x.shape)
    parts = []
    for value in (x, chosen):
        left = step.freeze_axes(value, [axis], "is chosen from by a tensor")
        shape = tuple(1 if a == axis else n for a, n in enumerate(value.shape))
        parts.append(part(Value(shape, left), range(rank), rank))
    return step.value(agree(step, parts, "is chosen by a tensor of fixed channels"))


def index(step: Step) -> Value:
    """Index one axis by a constant, or any axes by tensors, which then hold no channels that can go."""
    x, indices = step.args[0], step.args[1]
    used = [axis for axis, i in enumerate(indices) if i is not None]
    if len(used) == 1 and indices[used[0]].data is not None and indices[used[0]].data.ndim == 1:
        return _taken(step, indices[used[0]].data, used[0], step.shape)
    left = step.freeze_axes(x, used, "is indexed by a tensor")
    for chosen in (indices[axis] for axis in used):
        step.freeze_axes(chosen, range(len(chosen.shape)), "indexes another tensor")
    adjacent = used[-1] - used[0] == len(used) - 1
    new = max(len(indices[axis].shape) for axis in used)
    kept = [axis for axis in range(len(x.shape)) if axis not in used]
    front = used[0] if adjacent else 0
    shapes = [[f.shape[axis] for axis in kept] for f in left]
    return step.value(
        [f.reshape(s[:front] + [1] * new + s[front:]) for f, s in zip(left, shapes, strict=True)],
        weight=x.weight,
    )


RULES: dict[str, Rule] = {
    "slice": slicing,
    "narrow": narrow,
    "select": select,
    "unbind": unbind,
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"), split
    ),
    "glu": glu,
    "index_select": index_select,
    "index": index,
    **dict.fromkeys(("gather", "take_along_dim"), gather),
}
