"""What a run needs of memory and disk, estimated before anything is copied or written."""

from __future__ import annotations

import math

import psutil

from penjing.core.backend import Backend
from penjing.core.budget import Budget, say
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits
from penjing.core.value import Model
from penjing.measurement.process import usual_limits

COPIES = 4
"""Copies of the weights in memory at one time: sent, rebuilt in the child, changed there, exported."""

MEMORY_SHARE = 0.9
"""Share of the free memory that one candidate may take."""

USUAL_TRIALS = 12
"""Trials that a search without a limit on them makes about."""

_BYTES = 4


def estimate_model_bytes(backend: Backend, model: Model) -> int:
    """Estimate the bytes of a model's weights, four for each number; nothing is read or copied."""
    shapes = (shape for layer in backend.layers(model) for shape in layer.shapes.values())
    return _BYTES * sum(math.prod(shape) for shape in shapes)


def check_memory(weights: int) -> None:
    """Refuse a model whose copies would not fit the free memory.

    Raises:
        Refused: says what is needed and what there is.
    """
    needed, available = COPIES * weights, int(psutil.virtual_memory().available)
    if needed > available:
        raise Refused(
            "the memory must hold the copies of the model that a run needs",
            place="model",
            value=f"about {say(needed, 'bytes')} needed for weights of {say(weights, 'bytes')}, "
            f"{say(available, 'bytes')} available",
            fix="free memory, or use a larger machine",
            code=Exit.ENVIRONMENT,
        )


def limit_candidate(seconds: float | None) -> Limits:
    """Return the limits of one candidate's process: its time, and most of the memory that is free now.

    Without a limit of its own a candidate that grows would be ended by the system, and others with it.
    """
    return Limits(seconds=seconds, memory_bytes=int(MEMORY_SHARE * psutil.virtual_memory().available))


def limit_measurement(seconds: float | None) -> Limits:
    """Return the limits of a process that is measured: a request may take the run's time, and not more.

    Args:
        seconds: of the whole run; None for the usual limit alone.
    """
    usual = usual_limits()
    most = min(filter(None, (seconds, usual.seconds)), default=None)
    return usual.model_copy(update={"seconds": most})


def estimate_disk_bytes(weights: int, budget: Budget) -> int:
    """Estimate what a run writes: the float model twice, and two files of at most its size for a trial."""
    trials = USUAL_TRIALS if budget.trials is None else budget.trials
    return weights * 2 * (1 + trials)
