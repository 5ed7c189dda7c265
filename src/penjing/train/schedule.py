"""Learning rate schedules as pure functions of step and total: a shortened run still anneals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

Schedule = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_restarts",
    "polynomial",
    "exponential",
    "step",
    "inverse_sqrt",
    "warmup_stable_decay",
    "one_cycle",
    "plateau",
]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

WARM_UP = 0.05
ONE_CYCLE_RISE = 0.3
LAST = 0.01
"""Where `exponential` ends."""

DROPS = (0.5, 0.75)
"""Shares of the way at which `step` divides the rate by 10."""

CYCLES = (1 / 7, 3 / 7)
"""Shares of the way at which `cosine_restarts` begins anew; each cycle is twice as long as the last."""

STABLE = 0.8
"""Share of the way that `warmup_stable_decay` stays at the highest rate."""


def lr_factor(schedule: Schedule, step: int, total: int, warmup: float = WARM_UP) -> float:
    """Return the share of the highest rate to use at a step, `0 <= step < total`; in (0, 1].

    All rise linearly over the first steps, `warmup` of all (`one_cycle` over the first 30%). Then, with p the
    share of the way that is behind:

    - `constant`: 1, and so is `plateau`, which whoever watches the training lowers;
    - `linear`: 1 - p (linear decay to zero: Defazio et al. 2023);
    - `cosine`: half a cosine to zero; `one_cycle` too (Smith and Topin 2019);
    - `cosine_restarts`: three of them, each twice as long as the last (Loshchilov and Hutter 2017, "SGDR");
    - `polynomial`: (1 - p) squared;
    - `exponential`: 0.01 to the power p;
    - `step`: a tenth from p = 1/2 on, a hundredth from 3/4 on (He et al. 2016);
    - `inverse_sqrt`: the root of warm-up over steps (Vaswani et al. 2017);
    - `warmup_stable_decay`: 1 until p = 0.8, then 1 minus the root of the share of the rest that is behind
      (Hägele et al. 2024).

    What falls to zero would reach it at `step == total`, which is never taken.

    >>> [round(lr_factor("linear", step, 4), 3) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [round(lr_factor("one_cycle", step, 10), 2) for step in (0, 3, 9)]
    [0.25, 1.0, 0.05]
    """
    rise = int((ONE_CYCLE_RISE if schedule == "one_cycle" else warmup) * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "inverse_sqrt":
        return math.sqrt((rise + 1) / (step + 1))
    return _FALLS[schedule]((step - rise) / (total - rise))


def _cosine(p: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * p))


def _restarts(p: float) -> float:
    start, end = max((a, b) for a, b in zip((0.0, *CYCLES), (*CYCLES, 1.0), strict=True) if a <= p)
    return _cosine((p - start) / (end - start))


def _cooled(p: float) -> float:
    return 1.0 if p < STABLE else 1.0 - math.sqrt((p - STABLE) / (1.0 - STABLE))


_FALLS: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "plateau": lambda p: 1.0,
    "linear": lambda p: 1.0 - p,
    "cosine": _cosine,
    "one_cycle": _cosine,
    "cosine_restarts": _restarts,
    "polynomial": lambda p: (1.0 - p) ** 2,
    "exponential": lambda p: LAST**p,
    "step": lambda p: 0.1 ** sum(p >= drop for drop in DROPS),
    "warmup_stable_decay": _cooled,
}
