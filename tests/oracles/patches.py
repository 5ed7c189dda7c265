"""What every output position of a convolution sees, as rows of a matrix (im2col)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.patches import Padding, Sizes, windows


def patches(
    x: NDArray[Any],
    kernel: Sequence[int],
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    mode: str = "constant",
) -> NDArray[Any]:
    """Return the input values under the kernel at every output position.

    A convolution is then a product: `y = patches(x, ...) @ weight.reshape(out, -1).T`, the rows of y in the
    order of examples and positions.

    Args:
        x, kernel, stride, padding, dilation, mode: as of `windows`.

    Returns:
        `[n * positions, channels * prod(kernel)]`, columns in the order of a weight's `[in, *kernel]`.

    Raises:
        Refused: the kernel is larger than the padded input, or its rank does not fit.

    >>> patches(np.arange(4.0).reshape(1, 1, 4), (2,), stride=2).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    seen = windows(x, kernel, stride, padding, dilation, mode)
    return seen.reshape(-1, x.shape[1] * int(np.prod(kernel)))
