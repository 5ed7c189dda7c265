"""Labels of channels on the elements of a tensor, and how they follow reshapes and joins.

An *atom* is a number for one channel of one tensor; -1 stands for no channel. A *factor* is an array of
atoms with as many axes as the tensor that it labels, of size 1 on every axis along which they do not vary. A
tensor carries a tuple of factors that vary on different axes: an element is there if and only if all its
atoms stay. A convolution's output has one factor `[1, C, 1, 1]`, its weight two, `[O, 1, 1, 1]` and
`[1, I, 1, 1]`; seen as heads, `view(N, T, 3, H, D)`, the factor is `[1, 1, 3, H, D]` with every atom
different. Reshapes, slices and joins are then plain NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""Atoms, -1 where a coordinate is no channel."""

Shape = tuple[int, ...]


def fixed(length: int) -> Labels:
    """Return labels of an axis that holds no channels."""
    return np.full(length, -1, np.int64)


def varying(factor: Labels) -> tuple[int, ...]:
    """Return the axes along which a factor varies.

    >>> varying(np.zeros((1, 3, 1, 2), np.int64))
    (1, 3)
    """
    return tuple(axis for axis, n in enumerate(factor.shape) if n > 1)


def on_axis(labels: Labels, axis: int, rank: int) -> Labels:
    """Return the factor of one labelled axis of a tensor with `rank` axes."""
    shape = [1] * rank
    shape[axis] = len(labels)
    return labels.reshape(shape)


def collapsed(factor: Labels, classes: Labels) -> Labels:
    """Return a factor with size 1 on every axis along which the classes of its atoms do not vary.

    Args:
        factor: atoms; of atoms of one class the first one stands for all.
        classes: class of every atom, and -1 as the last entry, so that the label -1 finds it.
    """
    for axis in varying(factor):
        first = factor.take([0], axis)
        if (classes[factor] == classes[first]).all():
            factor = first
    return factor


def reshaped(factor: Labels, before: Shape, after: Shape) -> Labels:
    """Return the factor of a tensor that is reshaped; it varies over all of a run of axes or not at all."""
    wide: list[int] = []
    target: list[int] = []
    for axes, shape in segments(before, after):
        varies = any(factor.shape[axis] > 1 for axis in axes)
        wide += [before[axis] if varies else 1 for axis in axes]
        target += [n if varies else 1 for n in shape]
    return np.ascontiguousarray(np.broadcast_to(factor, wide)).reshape(target)


def segments(before: Shape, after: Shape) -> Iterator[tuple[tuple[int, ...], Shape]]:
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


def widened(factor: Labels, axes: Sequence[int], shape: Shape) -> Labels:
    """Return a factor repeated to the full size of some axes."""
    target = [shape[axis] if axis in axes else n for axis, n in enumerate(factor.shape)]
    return np.broadcast_to(factor, target)


def joined(parts: Sequence[tuple[Labels, Shape]], axis: int, axes: Sequence[int]) -> Labels:
    """Return the factor of tensors joined along one axis, from a factor (or label) of each and its shape.

    Args:
        parts: factors with as many axes as the tensors, and the tensors' shapes.
        axis: the axis of the join.
        axes: the axes on which the result may vary, `axis` among them.
    """
    wide = [widened(factor, axes, shape) for factor, shape in parts]
    return np.concatenate(wide, axis)


def aligned(factor: Labels, axes: Sequence[int], rank: int) -> Labels:
    """Return a factor whose axis `i` becomes axis `axes[i]` of `rank` axes."""
    order = np.argsort(axes, kind="stable")
    shape = [1] * rank
    for axis in range(factor.ndim):
        shape[axes[axis]] = factor.shape[axis]
    return factor.transpose(order).reshape(shape)


def units_left(classes: Labels, stays: NDArray[np.bool_], axis: int) -> int:
    """Return how many units could still go if all classes on each line along an axis became one.

    Args:
        classes: of every element of a factor.
        stays: elements that stay; with them their whole line does.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    lines = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
    names, numbers = np.unique(lines, return_inverse=True)
    numbers = numbers.reshape(lines.shape)
    pairs = (np.broadcast_to(numbers[:1], numbers.shape).reshape(-1), numbers.reshape(-1))
    graph = coo_matrix((np.ones(numbers.size, bool), pairs), shape=(len(names), len(names)))
    count, component = connected_components(graph, directed=False)
    gone = np.zeros(count, bool)
    gone[component[numbers[np.moveaxis(stays, axis, 0).reshape(numbers.shape)]]] = True
    return int((~gone).sum())
