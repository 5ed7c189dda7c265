"""Sittings of fresh processes: what differs between two processes of one file is not of the file."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from penjing.arrays.latency_statistics import processes_interval
from penjing.core.errors import Refused
from penjing.core.measurement import Noise
from penjing.measurement import sittings
from penjing.measurement.latency import interleave, summarise
from penjing.measurement.sittings import Effort, Sittings, summarise_sittings, take_sittings


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch):
    monkeypatch.setattr("penjing.measurement.latency._WARM_S", 0.0)


class Machine:
    """Where every process gets a speed of its own, which it keeps, besides the jitter of calls."""

    def __init__(self, seed: int, apart: float = 0.02) -> None:
        self.rng = np.random.default_rng(seed)
        self.apart = apart
        self.opened: list[float] = []

    @contextmanager
    def open(self, base_ms: float, fails_at: int = 99):
        self.opened.append(base_ms)
        if self.opened.count(base_ms) > fails_at:
            raise Refused("must survive", value="killed", place="a", fix="b")
        yield Process(self, base_ms * self.rng.lognormal(0, self.apart))


class Process:
    def __init__(self, machine: Machine, base_ms: float) -> None:
        self.machine, self.base_ms = machine, base_ms

    def time(self, calls: int, warmup: int = 0) -> list[float]:
        return list(self.base_ms * self.machine.rng.lognormal(0, 0.005, calls))


def openers(machine, **bases):
    return {name: lambda base=base: machine.open(base) for name, base in bases.items()}


def excludes_one(ratio) -> bool:
    return not ratio.low <= 1 <= ratio.high


def test_identical_files_are_told_apart_by_one_pair_of_processes_but_not_by_several():
    one_pair = several = one_sitting = 0
    for seed in range(100):
        machine = Machine(seed)
        with machine.open(2.0) as reference, machine.open(2.0) as other:
            samples = interleave({"reference": reference, "other": other}, rounds=15)
        one_pair += excludes_one(summarise(samples["other"], samples["reference"], 1, 1, "reference").ratio)
        taken = take_sittings(openers(machine, reference=2.0, other=2.0), "reference", Effort(60.0))
        several += excludes_one(summarise_sittings(taken, "other", "reference", 1, 1).ratio)
        taken = take_sittings(openers(machine, reference=2.0, other=2.0), "reference", Effort(0.0))
        one_sitting += excludes_one(summarise_sittings(taken, "other", "reference", 1, 1).ratio)
    assert one_pair > 60
    assert several <= 5
    assert one_sitting <= 5


def test_a_difference_is_still_found_and_told_with_its_noise():
    taken = take_sittings(openers(Machine(0), reference=2.0, other=4.0), "reference", Effort(60.0))
    found = summarise_sittings(taken, "other", "reference", batch=1, threads=1)
    assert 1.85 < found.ratio.low < found.ratio.value < found.ratio.high < 2.15
    assert found.sittings == sittings.MOST_SITTINGS
    assert found.noise == taken.noise
    assert found.noise.processes == 1 + sittings.TWINS
    assert f"fresh processes, {sittings.MOST_SITTINGS} of each" in found.ratio.how
    assert found.rounds == found.ratio.n == 6 * sittings.MOST_SITTINGS
    for name in ("p50_ms", "p95_ms", "p99_ms", "throughput_per_s"):
        estimate = getattr(found, name)
        assert estimate.low < estimate.value < estimate.high
        assert estimate.high / estimate.low > (1 + found.noise.relative) ** 2, (
            "the noise widens every interval"
        )


def test_one_sitting_is_made_in_any_case_with_more_processes_of_the_reference():
    machine = Machine(1)
    taken = take_sittings(openers(machine, reference=2.0, other=3.0), "reference", Effort(0.0))
    assert len(taken.samples["other"]) == 1
    assert sorted(machine.opened) == [2.0] * (1 + sittings.TWINS) + [3.0]
    assert set(taken.samples) == {"reference", "other"}


def test_noise_that_is_known_is_not_measured_again():
    machine, known = Machine(1), Noise(relative=0.03, processes=4)
    taken = take_sittings(openers(machine, reference=2.0, other=3.0), "reference", Effort(0.0, known))
    assert sorted(machine.opened) == [2.0, 3.0]
    assert taken.noise == known


def test_no_sitting_is_begun_that_would_end_too_late(monkeypatch):
    clock = iter(range(1000))
    now = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr("penjing.measurement.sittings.time", now)
    # Every look at the clock is a second later; a sitting takes one second, from its start to its end.
    taken = take_sittings(openers(Machine(2), reference=2.0), "reference", Effort(5.0))
    assert len(taken.samples["reference"]) == 4


def test_what_fails_in_a_later_sitting_is_left_out_and_told():
    machine, told = Machine(3), []
    entries = openers(machine, reference=2.0) | {"other": lambda: machine.open(3.0, fails_at=1)}
    taken = take_sittings(
        entries, "reference", Effort(60.0), lambda name, refusal: told.append((name, refusal.value))
    )
    assert set(taken.samples) == {"reference"}
    assert told == [("other", "killed")]
    with pytest.raises(Refused, match="must survive"):
        take_sittings({"other": lambda: machine.open(3.0, fails_at=0)}, "other", Effort(0.0))


def test_one_sitting_is_summarised_by_its_rounds_and_the_noise():
    rounds = [[2.0, 2.1], [2.2, 2.0], [2.0, 2.0], [2.1, 2.1], [2.0, 2.2], [2.1, 2.0]]
    alone = summarise_sittings(Sittings({"a": [rounds]}), "a", None, 1, 1)
    assert alone == summarise(rounds, None, 1, 1)
    noisy = summarise_sittings(
        Sittings({"a": [rounds]}, noise=Noise(relative=0.02, processes=3)), "a", None, 1, 1
    )
    assert noisy.p50_ms.value == alone.p50_ms.value
    assert noisy.p50_ms.low < 0.93 * alone.p50_ms.value
    assert noisy.p50_ms.high > 1.07 * alone.p50_ms.value


def test_the_interval_over_processes_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        found = processes_interval(rng.lognormal(0.3, 0.1, 4))
        covered += found.low <= np.exp(0.3) <= found.high
    assert 0.935 < covered / 2000 < 0.965


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_values_without_an_interval_are_refused(values):
    with pytest.raises(Refused):
        processes_interval(values)
