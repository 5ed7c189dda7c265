"""How sparsity rises while a network trains."""

from __future__ import annotations

from typing import Literal

Ramp = Literal["cubic", "constant", "one_shot"]


def ramp_at(ramp: Ramp, progress: float, begin: float, end: float, sparsity: float) -> float:
    """Return the share of zeros at a point of the training, from 0 to `sparsity`.

    `cubic` is `s (1 - (1 - t)³)` with t from 0 at `begin` to 1 at `end`: many weights go while there are
    many, few at the end (Zhu & Gupta 2017, "To prune, or not to prune", eq. 1). The others jump at `begin`.

    Args:
        ramp: the kind.
        progress: share of the training that lies behind, in [0, 1].
        begin, end: shares of the training, `0 <= begin <= end <= 1`.
        sparsity: final share of zeros in (0, 1).

    >>> [round(ramp_at("cubic", t, 0.0, 0.5, 0.8), 3) for t in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.7, 0.8, 0.8]
    """
    if progress < begin:
        return 0.0
    if ramp != "cubic" or progress >= end:
        return sparsity
    return sparsity * (1 - (1 - (progress - begin) / (end - begin)) ** 3)


def round_sparsity(number: int, rounds: int, sparsity: float) -> float:
    """Return the share of zeros after round `number` of `rounds` (from 1): each round keeps the same share.

    (Frankle & Carbin 2019, "The lottery ticket hypothesis": iterative pruning.)

    >>> [round(round_sparsity(n, 3, 0.875), 3) for n in (1, 2, 3)]
    [0.5, 0.75, 0.875]
    """
    kept: float = (1 - sparsity) ** (number / rounds)
    return 1 - kept
