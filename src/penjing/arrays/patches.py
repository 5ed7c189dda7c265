"""What every output position of a convolution sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from penjing.core.errors import Refused

Sizes = int | Sequence[int]
Padding = int | Sequence[int] | Sequence[tuple[int, int]]
"""The same on all sides, one number for each axis, or `(before, after)` for each axis."""


def windows(
    x: NDArray[Any],
    kernel: Sequence[int],
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    mode: str = "constant",
) -> NDArray[Any]:
    """Return what every output position sees, as a view that takes no memory of its own beside padding.

    Args:
        x: `[n, channels, *spatial]`.
        kernel: size along each spatial axis.
        stride, dilation: one number, or one for each spatial axis, at least 1.
        padding: see `Padding`, at least 0.
        mode: how NumPy's `pad` fills the border: `constant` (zeros), `reflect`, `edge` or `wrap`.

    Returns:
        `[n, *positions, channels, *kernel]`; read-only.

    Raises:
        Refused: the kernel is larger than the padded input, or its rank does not fit.
    """
    rank = x.ndim - 2
    if len(kernel) != rank:
        raise Refused(
            "the kernel must have one size for each spatial axis",
            value=f"{tuple(kernel)} for {x.shape}",
            place="patches",
            fix=f"give {x.ndim - 2} sizes",
        )
    strides, spread = _each(stride, rank), _each(dilation, rank)
    sides = padding_pairs(padding, rank)
    if any(side != (0, 0) for side in sides):
        x = np.pad(x, ((0, 0), (0, 0), *sides), mode=mode)  # type: ignore[call-overload]
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, spread, strict=True))
    if any(e > size for e, size in zip(extent, x.shape[2:], strict=True)):
        raise Refused(
            "the kernel must fit into the padded input",
            value=f"{extent} for {x.shape[2:]}",
            place="patches",
            fix="pad the input, or take a smaller kernel or dilation",
        )
    seen = sliding_window_view(x, extent, axis=tuple(range(2, x.ndim)))
    steps = tuple(slice(None, None, s) for s in strides) + tuple(slice(None, None, d) for d in spread)
    seen = seen[(slice(None), slice(None), *steps)]
    return seen.transpose(0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))


def padding_pairs(padding: Padding, rank: int) -> tuple[tuple[int, int], ...]:
    """Return padding as `(before, after)` for each of `rank` axes.

    >>> padding_pairs(1, 2), padding_pairs((1, 2), 2), padding_pairs(((0, 1),), 1)
    (((1, 1), (1, 1)), ((1, 1), (2, 2)), ((0, 1),))
    """
    sides: tuple[Any, ...] = (padding,) * rank if isinstance(padding, int) else tuple(padding)
    pairs = [(s, s) if isinstance(s, int) else (s[0], s[1]) for s in sides]
    if len(pairs) != rank:
        raise Refused(
            "the padding must be given for each spatial axis",
            value=repr(padding),
            place="patches",
            fix="give (before, after) for each of them",
        )
    return tuple(pairs)


def _each(sizes: Sizes, rank: int) -> tuple[int, ...]:
    values = (sizes,) * rank if isinstance(sizes, int) else tuple(sizes)
    if len(values) != rank or min(values, default=1) < 1:
        raise Refused(
            "strides and dilations must be at least 1, one for each spatial axis",
            value=repr(sizes),
            place="patches",
            fix="give a 1 where an axis is read without a gap",
        )
    return values
