"""Latency in several sittings: each opens every artefact in a fresh process and times all in turn.

Two processes of one file differ, for as long as they live, by where their memory came to lie. One pair of
processes, however long it is timed, takes that for a difference of the files. So the rounds are taken in
sittings, intervals come from the spread between sittings, and the noise of the machine is measured first:
in the first sitting the reference is timed beside another process of its own file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np

from penjing.arrays.latency_statistics import Floats, percentile, processes_interval, round_medians
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate, Latency
from penjing.measurement.latency import LEAST_ROUNDS, OnFailure, Samples, Timed, interleave, summarise

Open = Callable[[], AbstractContextManager[Timed]]
"""Opens an artefact in a process, ready to be timed; called once for each sitting."""

LEAST_SITTINGS, MOST_SITTINGS = 3, 8

_TWIN = "\0the reference once more"


@dataclass(frozen=True)
class Sittings:
    """The times of several sittings.

    Attributes:
        samples: by name, for each sitting, for each round, the milliseconds of each call.
        noise: relative difference of two processes of the reference's file in the first sitting; None where
            there was but one sitting.
    """

    samples: Mapping[str, Sequence[Sequence[Sequence[float]]]]
    noise: float | None


def take_sittings(
    openers: Mapping[str, Open],
    reference: str,
    seconds: float = 10.0,
    on_failure: OnFailure | None = None,
    min_calls: int = 3,
) -> Sittings:
    """Time artefacts in turn, in sittings of fresh processes.

    Args:
        openers: by name.
        reference: whose file tells the noise of the machine.
        seconds: no sitting is begun that would end after them, but for the first three; what the opening of
            processes takes counts.
        on_failure: told of what cannot be opened or timed, which is then left out; None: that is raised.
        min_calls: fewest timed calls of a round.

    >>> openers = {"float": open_float, "int8": open_int8}  # doctest: +SKIP
    >>> summarise_sittings(take_sittings(openers, "float"), "int8", "float", 1, 1).ratio  # doctest: +SKIP

    Raises:
        Refused: an artefact fails and `on_failure` is None.
    """
    begun, longest = time.monotonic(), 0.0
    taken: dict[str, list[list[list[float]]]] = {name: [] for name in openers}
    noise = None
    for index in range(MOST_SITTINGS):
        start = time.monotonic()
        if index >= LEAST_SITTINGS and start - begun + longest > seconds:
            break
        twin = index == 0 and LEAST_SITTINGS > 1 and reference in taken
        sat = _sit(
            {name: openers[name] for name in taken}, reference if twin else None, on_failure, min_calls
        )
        if twin and reference in sat and _TWIN in sat:
            noise = abs(_log_ratio(sat.pop(_TWIN), sat[reference]))
        taken = {name: [*rounds, sat[name]] for name, rounds in taken.items() if name in sat}
        longest = max(longest, time.monotonic() - start)
    return Sittings(taken, noise)


def _sit(
    openers: Mapping[str, Open], twin: str | None, on_failure: OnFailure | None, min_calls: int
) -> Samples:
    def fail(name: str, refusal: Refused) -> None:
        if on_failure is None:
            raise refusal
        if name != _TWIN:
            on_failure(name, refusal)

    every = dict(openers) if twin is None else {**openers, _TWIN: openers[twin]}
    with ExitStack() as stack:
        processes: dict[str, Timed] = {}
        for name, opener in every.items():
            try:
                processes[name] = stack.enter_context(opener())
            except Refused as refusal:
                fail(name, refusal)
        return interleave(processes, rounds=LEAST_ROUNDS, min_calls=min_calls, on_failure=fail)


def summarise_sittings(
    sittings: Sittings, name: str, reference: str | None, batch: int, threads: int
) -> Latency:
    """Summarise the times of one artefact; a pure function.

    Values are of all rounds, as in `summarise`; the ratio is the geometric mean over sittings of the median
    over rounds. Intervals are of `processes_interval`, at 95%; with one sitting those of its rounds.

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
    if len(mine) < 2:
        return found
    noise = sittings.noise or 0.0

    def widened(estimate: Estimate, statistic: Callable[[Floats], float]) -> Estimate:
        values = [statistic(np.concatenate([np.asarray(r) for r in rounds])) for rounds in mine]
        return _of_processes(estimate, values, noise, estimate.value)

    estimates = {
        "p50_ms": _of_processes(
            found.p50_ms, [float(np.median(round_medians(r))) for r in mine], noise, found.p50_ms.value
        ),
        "p95_ms": widened(found.p95_ms, percentile(95)),
        "p99_ms": widened(found.p99_ms, percentile(99)),
        "throughput_per_s": widened(found.throughput_per_s, lambda times: float(1 / times.mean())),
    }
    if found.ratio is not None and other is not None:
        ratios = [math.exp(_log_ratio(a, b)) for a, b in zip(mine, other, strict=True)]
        estimates["ratio"] = _of_processes(found.ratio, ratios, noise, None)
    return found.model_copy(update=estimates | {"sittings": len(mine), "noise": sittings.noise})


def _of_processes(
    estimate: Estimate, values: Sequence[float], noise: float, centre: float | None
) -> Estimate:
    """Return an estimate with the interval of several processes around its value, or around their mean."""
    mean, low, high = processes_interval(values, noise, estimate.confidence)
    value = mean if centre is None else centre
    words = f"{estimate.how}; interval over {len(values)} fresh processes, noise {noise:.2%}"
    return estimate.model_copy(
        update={"value": value, "low": value * low / mean, "high": value * high / mean}
        | {"n": len(values), "how": words}
    )


def _log_ratio(rounds: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """Return the median over rounds of the logarithm of one's median over the other's."""
    return float(np.median(np.log(round_medians(rounds) / round_medians(others))))


def _flat(sittings: Sequence[Sequence[Sequence[float]]]) -> list[Sequence[float]]:
    return [times for rounds in sittings for times in rounds]
