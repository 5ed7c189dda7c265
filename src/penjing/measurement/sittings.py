"""Latency in several sittings: each opens every artefact in a fresh process and times all in turn.

Two processes of one file differ, for as long as they live, by where their memory came to lie. One pair of
processes, however long it is timed, takes that for a difference of the files. So the noise of the machine is
measured first: the reference is timed beside three more processes of its own file, unless the caller knows
the noise. The rounds are taken in as many sittings as there is time for; intervals come from the spread
between sittings, or, where there was time for one only, from the noise alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np

from penjing.arrays.latency_statistics import (
    Floats,
    Statistic,
    percentile,
    processes_interval,
    processes_noise,
    round_medians,
    widened_interval,
)
from penjing.arrays.statistics import Interval
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate, Latency, Noise
from penjing.measurement.latency import LEAST_ROUNDS, OnFailure, Samples, Timed, interleave, summarise

Open = Callable[[], AbstractContextManager[Timed]]
"""Opens an artefact in a process, ready to be timed; called once for each sitting."""

Rounds = Sequence[Sequence[float]]

MOST_SITTINGS = 8

TWINS = 3
"""Further processes of the reference in a first sitting that tells the noise of the machine."""


@dataclass(frozen=True)
class Effort:
    """What a comparison of latencies may cost.

    Attributes:
        seconds: no sitting is begun that would end after them, but for the first; what the opening of
            processes takes counts.
        noise: what two processes differ by, where it was measured before; None to measure it.
        min_calls: fewest timed calls of a round.
    """

    seconds: float = 10.0
    noise: Noise | None = None
    min_calls: int = 3


@dataclass(frozen=True)
class Sittings:
    """The times of several sittings.

    Attributes:
        samples: by name, for each sitting, for each round, the milliseconds of each call.
        noise: what two processes of one file differ by; None where it is not known.
    """

    samples: Mapping[str, Sequence[Rounds]]
    noise: Noise | None = None


def take_sittings(
    openers: Mapping[str, Open],
    reference: str,
    effort: Effort = Effort(),
    on_failure: OnFailure | None = None,
) -> Sittings:
    """Time artefacts in turn, in sittings of fresh processes.

    Args:
        openers: by name.
        reference: whose file tells the noise of the machine.
        effort: seconds, and what is known of the noise.
        on_failure: told of what cannot be opened or timed, which is then left out; None: that is raised.

    >>> openers = {"float": open_float, "int8": open_int8}  # doctest: +SKIP
    >>> summarise_sittings(take_sittings(openers, "float"), "int8", "float", 1, 1).ratio  # doctest: +SKIP

    Raises:
        Refused: an artefact fails and `on_failure` is None.
    """
    begun = time.monotonic()
    more = TWINS if effort.noise is None and reference in openers else 0
    twins = {f"\0{reference} {i}": openers[reference] for i in range(more)}
    first = _sit({**openers, **twins}, twins.keys(), on_failure, effort.min_calls)
    noise = effort.noise or _noise([first.pop(name) for name in twins if name in first], first.get(reference))
    taken = {name: [rounds] for name, rounds in first.items()}
    longest = time.monotonic() - begun
    for _ in range(MOST_SITTINGS - 1):
        if not taken or time.monotonic() - begun + longest > effort.seconds:
            break
        sat = _sit({name: openers[name] for name in taken}, (), on_failure, effort.min_calls)
        taken = {name: [*rounds, sat[name]] for name, rounds in taken.items() if name in sat}
    return Sittings(taken, noise)


def _noise(twins: Sequence[Rounds], reference: Rounds | None) -> Noise | None:
    if reference is None or not twins:
        return None
    logs = [0.0, *(_log_ratio(rounds, reference) for rounds in twins)]
    return Noise(relative=processes_noise(logs), processes=len(logs))


def _sit(
    openers: Mapping[str, Open], spare: Collection[str], on_failure: OnFailure | None, min_calls: int
) -> Samples:
    """Make one sitting; what fails is left out, and told of unless it is spare."""

    def fail(name: str, refusal: Refused) -> None:
        if name in spare:
            return
        if on_failure is None:
            raise refusal
        on_failure(name, refusal)

    with ExitStack() as stack:
        processes: dict[str, Timed] = {}
        for name, opener in openers.items():
            try:
                processes[name] = stack.enter_context(opener())
            except Refused as refusal:
                fail(name, refusal)
        return interleave(processes, rounds=LEAST_ROUNDS, min_calls=min_calls, on_failure=fail)


def summarise_sittings(
    sittings: Sittings, name: str, reference: str | None, batch: int, threads: int
) -> Latency:
    """Summarise the times of one artefact; a pure function.

    Values are of all rounds, as in `summarise`. Intervals, at 95%, are of `processes_interval`, and with one
    sitting of `widened_interval`.

    Args:
        sittings: of all artefacts.
        name: of this one.
        reference: of which the latency counts as 1; None for no ratio.
        batch, threads: of one call, for the record.

    Raises:
        Refused: no rounds, or a time that is not positive.
    """
    mine = sittings.samples[name]
    other = None if reference is None else sittings.samples[reference]
    found = summarise(_flat(mine), None if other is None else _flat(other), batch, threads, reference or "")
    statistics: dict[str, Statistic] = {
        "p50_ms": percentile(50),
        "p95_ms": percentile(95),
        "p99_ms": percentile(99),
        "throughput_per_s": lambda times: float(1 / times.mean()),
    }
    estimates = {
        field: _between(getattr(found, field), [statistic(_all(rounds)) for rounds in mine], sittings)
        for field, statistic in statistics.items()
    }
    if found.ratio is not None and other is not None:
        ratios = [math.exp(_log_ratio(a, b)) for a, b in zip(mine, other, strict=True)]
        estimates["ratio"] = _between(found.ratio, ratios, sittings)
    return found.model_copy(update=estimates | {"sittings": len(mine), "noise": sittings.noise})


def _between(estimate: Estimate, values: Sequence[float], sittings: Sittings) -> Estimate:
    """Return an estimate with the interval that holds for other processes as well.

    Args:
        estimate: of all rounds.
        values: the same of each sitting.
    """
    noise, n = sittings.noise, len(values)
    relative = 0.0 if noise is None else noise.relative
    if n > 1:
        mean, low, high = processes_interval(values, relative, estimate.confidence)
        low, high = estimate.value * low / mean, estimate.value * high / mean
    elif noise is not None:
        rounds = Interval(estimate.value, estimate.low, estimate.high)
        _, low, high = widened_interval(rounds, relative, noise.processes, estimate.confidence)
    else:
        return estimate
    how = f"{estimate.how}; interval over fresh processes, {n} of each, which differ by {relative:.2%}"
    return estimate.model_copy(update={"low": low, "high": high, "how": how})


def _all(rounds: Rounds) -> Floats:
    return np.concatenate([np.asarray(times, dtype=np.float64) for times in rounds])


def _log_ratio(rounds: Rounds, others: Rounds) -> float:
    """Return the median over rounds of the logarithm of one's median over the other's."""
    return float(np.median(np.log(round_medians(rounds) / round_medians(others))))


def _flat(sittings: Sequence[Rounds]) -> list[Sequence[float]]:
    return [times for rounds in sittings for times in rounds]
