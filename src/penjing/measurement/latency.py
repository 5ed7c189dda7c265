"""Latency of several artefacts side by side: interleaved rounds, medians, intervals, paired ratios."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from penjing.arrays.latency_statistics import check_rounds, percentile, round_medians, rounds_interval
from penjing.arrays.statistics import Interval, median_interval, paired_ratio_interval
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate, Latency

LEAST_ROUNDS = 6
"""The fewest rounds whose range is an interval of the median at 95%: 1 - 2 / 2**6 = 0.97."""

ROUND_S = 0.05
_WARM_S = 0.2

Samples = dict[str, list[list[float]]]
OnFailure = Callable[[str, Refused], None]


class Timed(Protocol):
    """Whatever can time calls of itself; a `RuntimeProcess` does."""

    def time(self, calls: int, warmup: int = 0) -> list[float]:
        """Return the milliseconds of each call, after some that are not timed."""


def interleave(
    processes: Mapping[str, Timed],
    rounds: int = 15,
    min_calls: int = 3,
    seconds: float = 10.0,
    on_failure: OnFailure | None = None,
) -> Samples:
    """Time processes in turn, so that a machine that drifts drifts for all of them.

    Each is warmed up first. In a round every process times as many calls as take about 50 ms (at least
    `min_calls`), after a few that are not counted because the caches belong to its predecessor, while the
    others idle; the order is rotated from round to round and reversed every second time round.

    Args:
        processes: by name; each holds its model and its batch.
        rounds: wanted number, at least 6.
        min_calls: fewest timed calls of a round.
        seconds: once they are over no round is begun, but for the first 6.
        on_failure: told of a process that is refused, which is then left out; None: the refusal is raised.

    Returns:
        For each process, for each round, the milliseconds of each call.

    >>> samples = interleave({"float": a, "int8": b}, seconds=2.0)  # doctest: +SKIP

    Raises:
        Refused: fewer than 6 rounds, or a process fails and `on_failure` is None.
    """
    if rounds < LEAST_ROUNDS:
        raise Refused(
            f"must be at least {LEAST_ROUNDS}",
            value=rounds,
            place="interleave.rounds",
            fix=f"ask for {LEAST_ROUNDS} rounds or more, and for fewer seconds",
        )
    start = time.monotonic()
    field = _Field(processes, on_failure)
    calls = {name: spent for name in processes if (spent := field.calls_in_a_round(name, min_calls))}
    samples: Samples = {name: [] for name in calls}
    for index in range(rounds):
        if index >= LEAST_ROUNDS and time.monotonic() - start > seconds:
            break
        for name in order(list(samples), index):
            times = field.time(name, calls[name], 1 + calls[name] // 10)
            if times is None:
                del samples[name]
            else:
                samples[name].append(times)
    return samples


def order(names: Sequence[str], index: int) -> list[str]:
    """Return the order of a round: rotated by one each round, reversed every second time round.

    >>> [order("ab", i) for i in range(4)]
    [['a', 'b'], ['b', 'a'], ['b', 'a'], ['a', 'b']]
    """
    if not names:
        return []
    turn, shift = divmod(index, len(names))
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if turn % 2 else rotated


def summarise(
    samples: Sequence[Sequence[float]],
    reference_samples: Sequence[Sequence[float]] | None,
    batch: int,
    threads: int,
    reference: str = "",
    confidence: float = 0.95,
) -> Latency:
    """Summarise the rounds of one process; a pure function.

    The p50 is the median of the rounds' medians, with an interval between order statistics. The p95, the
    p99 and the throughput (examples over seconds spent in calls) are of all calls, with intervals that
    resample rounds. The ratio is the median over rounds of this median over the reference's.

    Args:
        samples: milliseconds of each call, round by round.
        reference_samples: the same rounds of the reference; None for no ratio.
        batch: examples in one call.
        threads: threads of one call, for the record.
        reference: the name of the reference.
        confidence: of every interval.

    >>> summarise([[1.0, 1.2]] * 6, None, batch=1, threads=1).p50_ms.value
    1.1

    Raises:
        Refused: no rounds, a time that is not positive, or a reference with other rounds.
    """
    rounds = check_rounds(samples)
    times = np.concatenate(rounds)
    medians = round_medians(samples)

    def estimate(found: Interval, n: int, unit: str, how: str) -> Estimate:
        return Estimate(
            value=float(found.value),
            low=float(found.low),
            high=float(found.high),
            confidence=confidence,
            n=n,
            unit=unit,
            how=how,
        )

    def of_all(statistic: Callable[..., float], unit: str, how: str) -> Estimate:
        return estimate(rounds_interval(samples, statistic, confidence), len(rounds), unit, how)

    ratio = None
    if reference_samples is not None:
        found = paired_ratio_interval(medians, round_medians(reference_samples), confidence)
        ratio = estimate(found, len(rounds), "", "median of ratios of medians, round by round")
    return Latency(
        p50_ms=estimate(
            median_interval(medians, confidence), len(rounds), "ms", "median of medians of rounds"
        ),
        p95_ms=of_all(percentile(95), "ms", "of all calls, bootstrap over rounds"),
        p99_ms=of_all(percentile(99), "ms", "of all calls, bootstrap over rounds"),
        throughput_per_s=of_all(
            lambda t: batch * 1e3 / float(t.mean()),
            "1/s",
            "examples per second of calls, bootstrap over rounds",
        ),
        ratio=ratio,
        reference=reference if ratio is not None else "",
        quantiles_ms=tuple(float(q) for q in np.percentile(times, np.arange(101))),
        batch=batch,
        threads=threads,
        calls=len(times),
        rounds=len(rounds),
    )


class _Field:
    """The processes that still run, and what to do with one that fails."""

    def __init__(self, processes: Mapping[str, Timed], on_failure: OnFailure | None) -> None:
        self._processes = processes
        self._on_failure = on_failure

    def time(self, name: str, calls: int, warmup: int) -> list[float] | None:
        try:
            return self._processes[name].time(calls, warmup)
        except Refused as refusal:
            if self._on_failure is None:
                raise
            self._on_failure(name, refusal)
            return None

    def calls_in_a_round(self, name: str, min_calls: int) -> int | None:
        """Warm a process up for 0.2 s and return how many of its calls take 50 ms; None where it failed."""
        start, calls = time.monotonic(), 1
        while True:
            times = self.time(name, calls, 0)
            if times is None:
                return None
            if time.monotonic() - start >= _WARM_S:
                break
            calls = min(calls * 2, 1024)
        return min(max(min_calls, math.ceil(ROUND_S * 1e3 / float(np.median(times)))), 10_000)
