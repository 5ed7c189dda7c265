"""Which units of one group stay at a share, by their scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.structure.selection import Floats, kept_width, strongest


def select(score: Floats, ratio: float, blocks: NDArray[np.int64], round_to: int) -> NDArray[np.int64]:
    """Return the units that stay, sorted: those of highest score, equally many from every block.

    Args:
        score: shape `[size]`; ties go to the lower index.
        ratio: share removed, in (0, 1).
        blocks: shape `[size]`, the block of every unit.
        round_to: the number that stays is a multiple of this where the group is wide enough.
    """
    return strongest(score, kept_width(len(score), ratio, len(np.unique(blocks)), round_to), blocks)
