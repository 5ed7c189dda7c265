"""Learning rate schedules as pure functions of step and total: a shortened run still anneals."""

from __future__ import annotations

import math
from typing import Literal

WARM_UP = 0.05
ONE_CYCLE_RISE = 0.3


def rate_factor(schedule: Literal["linear", "cosine", "one_cycle"], step: int, total: int) -> float:
    """Return the share of the highest rate to use at a step, `0 <= step < total`; in (0, 1].

    `linear` and `cosine` rise linearly over the first 5% of the steps and fall to zero (linear decay to
    zero: Defazio et al., 2023); `one_cycle` rises over the first 30% and falls by a cosine (Smith and
    Topin, 2019). The factor would reach zero at `step == total`, which is never taken.

    >>> [round(rate_factor("linear", step, 4), 3) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [round(rate_factor("one_cycle", step, 10), 2) for step in (0, 3, 9)]
    [0.25, 1.0, 0.05]
    """
    rise = int((ONE_CYCLE_RISE if schedule == "one_cycle" else WARM_UP) * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    fallen = (step - rise) / (total - rise)
    return 1.0 - fallen if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * fallen))
