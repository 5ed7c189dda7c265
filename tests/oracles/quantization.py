"""What integers on a grid stand for, by the definition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.quantization import Grid


def dequantize(q: NDArray[np.uint8], grid: Grid) -> NDArray[np.float32]:
    """Return the real values of integers on a grid: `(q - zero point) * scale`, float32."""
    return (q.astype(np.float32) - np.float32(grid.zero_point)) * np.float32(grid.scale)
