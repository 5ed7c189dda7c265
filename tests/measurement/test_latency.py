"""Interleaved timing and its summary, on synthetic clocks."""

import numpy as np
import pytest

from penjing.core.errors import Refused
from penjing.measurement.latency import LEAST_ROUNDS, interleave, order, summarise


class Machine:
    """A clock that all processes share: jitter, spikes, and a drift that slows whatever runs later."""

    def __init__(self, seed: int, drift: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.drift = drift
        self.calls = 0

    def times(self, base_ms: float, calls: int) -> list[float]:
        self.calls += calls
        slowdown = 1 + self.drift * self.calls
        jitter = self.rng.lognormal(0, 0.05, calls) + (self.rng.random(calls) < 0.01) * 5
        return list(base_ms * slowdown * jitter)


class Fake:
    """A process whose calls take `base_ms` on a machine."""

    def __init__(self, machine: Machine, base_ms: float) -> None:
        self.machine = machine
        self.base_ms = base_ms
        self.asked: list[int] = []

    def time(self, calls: int, warmup: int = 0) -> list[float]:
        self.asked.append(calls)
        return self.machine.times(self.base_ms, warmup + calls)[warmup:]


class Failing(Fake):
    """A process that dies at its n-th request of timed rounds."""

    def __init__(self, machine: Machine, fails_at: int) -> None:
        super().__init__(machine, 1.0)
        self.fails_at = fails_at

    def time(self, calls: int, warmup: int = 0) -> list[float]:
        if warmup or self.fails_at == 0:
            self.fails_at -= 1
            if self.fails_at < 0:
                raise Refused("must survive", value="killed by SIGSEGV", place="a", fix="b")
        return super().time(calls, warmup)


def ratio_of(machine: Machine, base_ms: float, rounds: int = 15):
    processes = {"reference": Fake(machine, 2.0), "other": Fake(machine, base_ms)}
    samples = interleave(processes, rounds=rounds)
    return summarise(samples["other"], samples["reference"], 1, 1, "reference").ratio


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch):
    monkeypatch.setattr("penjing.measurement.latency._WARM_S", 0.0)


def test_identical_processes_have_a_ratio_interval_that_covers_one():
    covered = 0
    for seed in range(40):
        ratio = ratio_of(Machine(seed), 2.0)
        covered += ratio.low <= 1 <= ratio.high
        assert ratio.value == pytest.approx(1, abs=0.05)
    assert covered >= 34  # 95% of 40 is 38; 33 or fewer has a probability below 0.3%


def test_twice_as_slow_is_detected():
    ratio = ratio_of(Machine(1), 4.0)
    assert ratio.low > 1.8
    assert ratio.high < 2.2


def test_a_machine_that_drifts_does_not_move_the_ratio():
    # It becomes several times slower while it measures; each median moves, the ratio does not.
    machine = Machine(2, drift=2e-3)
    processes = {"reference": Fake(machine, 2.0), "other": Fake(machine, 3.0)}
    samples = interleave(processes, rounds=16)
    latency = summarise(samples["other"], samples["reference"], 1, 1, "reference")
    medians = [np.median(times) for times in samples["other"]]
    assert medians[-1] > 1.5 * medians[0]
    assert latency.ratio.value == pytest.approx(1.5, rel=0.1)
    assert latency.ratio.low <= 1.5 <= latency.ratio.high


def test_every_process_is_first_equally_often():
    names = ["a", "b", "c"]
    firsts = [order(names, i)[0] for i in range(6)]
    assert sorted(firsts) == ["a", "a", "b", "b", "c", "c"]
    assert all(sorted(order(names, i)) == names for i in range(6))
    followers = {(o[i], o[i + 1]) for o in (order(names, i) for i in range(6)) for i in range(2)}
    assert len(followers) == 6, "every process follows every other"


def test_rounds_take_about_50_ms_and_at_least_the_calls_asked_for():
    machine = Machine(3)
    quick, slow = Fake(machine, 1.0), Fake(machine, 100.0)
    samples = interleave({"quick": quick, "slow": slow}, rounds=6, min_calls=4)
    assert 30 <= len(samples["quick"][0]) <= 100
    assert {len(times) for times in samples["slow"]} == {4}


def test_the_time_limit_ends_rounds_but_keeps_the_fewest():
    samples = interleave({"a": Fake(Machine(4), 1.0)}, rounds=1000, seconds=0)
    assert len(samples["a"]) == LEAST_ROUNDS


def test_too_few_rounds_are_refused():
    with pytest.raises(Refused, match=r"interleave\.rounds must be at least 6, got 5"):
        interleave({"a": Fake(Machine(5), 1.0)}, rounds=5)


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_process_that_fails_is_left_out_and_reported(fails_at):
    machine, told = Machine(6), []
    processes = {"good": Fake(machine, 1.0), "bad": Failing(machine, fails_at)}
    samples = interleave(processes, rounds=8, on_failure=lambda name, refusal: told.append((name, refusal)))
    assert list(samples) == ["good"]
    assert len(samples["good"]) == 8
    assert [name for name, _ in told] == ["bad"]
    assert "SIGSEGV" in str(told[0][1])


def test_without_a_listener_a_failure_is_raised():
    machine = Machine(7)
    with pytest.raises(Refused, match="SIGSEGV"):
        interleave({"good": Fake(machine, 1.0), "bad": Failing(machine, 2)}, rounds=8)


def test_a_summary_holds_what_was_timed():
    samples = [[1.0, 2.0, 3.0], [2.0, 2.0, 8.0], [1.0, 2.0, 2.0], [2.0, 3.0, 4.0], [2.0] * 3, [2.0, 2.5, 3.0]]
    latency = summarise(samples, None, batch=4, threads=2)
    assert latency.p50_ms.value == 2.0
    assert latency.p50_ms.low <= 2.0 <= latency.p50_ms.high
    assert latency.p95_ms.value == pytest.approx(np.percentile(np.concatenate(samples), 95))
    assert latency.throughput_per_s.value == pytest.approx(4e3 * 18 / np.sum(samples))
    assert latency.p99_ms.low <= latency.p99_ms.value <= latency.p99_ms.high
    assert (latency.batch, latency.threads, latency.calls, latency.rounds) == (4, 2, 18, 6)
    assert len(latency.quantiles_ms) == 101
    assert (latency.quantiles_ms[0], latency.quantiles_ms[100]) == (1.0, 8.0)
    assert latency.ratio is None


@pytest.mark.parametrize("samples", [[], [[1.0], []], [[1.0, 0.0]], [[float("nan")]], [[-1.0]]])
def test_impossible_times_are_refused(samples):
    with pytest.raises(Refused, match="latency"):
        summarise(samples, None, 1, 1)


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(Refused):
        summarise([[1.0]] * 8, [[1.0]] * 7, 1, 1)
