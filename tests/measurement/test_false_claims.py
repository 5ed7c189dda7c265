"""How often a candidate is certified that truly loses the limit: at most the stated 5%, for every metric.

The simulation is that of `benchmarks/certificates.py`, which has the table for `docs/certificate.md`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from penjing.arrays.betting import Bets, stakes_below
from penjing.arrays.bootstrap import bootstrap
from penjing.measurement import certify as module
from penjing.measurement.paired import PairedBootstrap
from penjing.measurement.quality import weighted_scores

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import certificates

CASES = {case.name: case for case in certificates.cases()}
ALPHA = 0.05


def most(runs: int) -> float:
    """The share of false claims that chance exceeds once in a thousand times, were the true one 5%."""
    scipy = pytest.importorskip("scipy.special")
    counts = np.arange(runs + 1)
    return float(counts[scipy.bdtr(counts, runs, ALPHA) > 0.999][0]) / runs


def false_share(case, n, runs):
    """The worse of the two kinds of harm."""
    found = [
        certificates.claims(case, draw, drop, n, runs, seed)
        for seed, (draw, drop) in enumerate(case.harms(n // case.repeats).values())
    ]
    return max(found) / runs


QUICK = [name for name in CASES if "1%" in name or "f1_macro, 5 copies" in name or "groups" in name]


@pytest.mark.parametrize("name", ["accuracy, ten classes", "top 3, ten classes", *QUICK])
def test_false_claims_are_no_more_than_stated(name, monkeypatch):
    monkeypatch.setattr(certificates, "LONG_DRAW", 100_000)
    runs = 20 if "groups" in name else 40
    assert false_share(CASES[name], 200, runs) <= most(runs)


@pytest.mark.parametrize("name", ["mae", "rmse", "ndcg", "log_loss"])
def test_false_claims_of_averages_are_no_more_than_stated(name, monkeypatch):
    monkeypatch.setattr(certificates, "LONG_DRAW", 100_000)
    assert false_share(CASES[name], 100, 40) <= most(40)


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 1_000])
@pytest.mark.parametrize("name", CASES)
def test_false_claims_are_no_more_than_stated_in_many_runs(name, n):
    assert false_share(CASES[name], n, 400) <= most(400)


def test_a_test_that_is_not_valid_is_found_out(monkeypatch):
    """Recall of a class of 5% by the bootstrap, as if it were a bound."""

    def compare(task, baseline, candidate, targets, groups=None):
        def drop(weights):
            first, second = (
                weighted_scores(task.metric, x.argmax(axis=1), targets, weights)
                for x in (baseline, candidate)
            )
            return first - second

        return PairedBootstrap(bootstrap(drop, len(targets), 200), len(targets), no_bound="")

    monkeypatch.setattr(module, "compare", compare)
    monkeypatch.setattr(PairedBootstrap, "p_value", lambda self, limit, alpha: 0.0)
    assert false_share(CASES["recall_macro, a class of 5%"], 200, 100) > most(100)


# The arithmetic of the bets


@pytest.mark.parametrize("alpha", [0.2, 0.05, 0.001])
def test_the_upper_bound_is_where_the_p_value_meets_the_level(alpha):
    rng = np.random.default_rng(0)
    losses = rng.uniform(-1, 1, 300) / 300
    bets = Bets(losses, stakes_below(np.full(300, 1 / 300)))
    upper = bets.upper(alpha)
    assert losses.sum() < upper
    assert bets.p_value(upper + 1e-6) <= alpha < bets.p_value(upper - 1e-6)


def test_bounds_rise_with_losses_and_confidence_and_do_not_ask_for_an_order():
    rng = np.random.default_rng(1)
    losses, stakes = rng.choice([-1, 0, 0, 0, 1], 500) / 500, stakes_below(np.full(500, 1 / 500))
    bound = Bets(losses, stakes).upper(0.05)
    assert Bets(rng.permutation(losses), stakes).upper(0.05) == pytest.approx(bound)
    assert Bets(losses, stakes).upper(0.01) > bound
    worse = losses.copy()
    worse[:5] = 1 / 500
    assert Bets(worse, stakes).upper(0.05) > bound


def test_bets_that_cannot_be_placed_bound_nothing():
    nothing = Bets(np.zeros(5), np.empty(0), lost=4)
    assert nothing.upper(0.05) == np.inf
    assert nothing.p_value(0.5) == 1.0
    ruined = Bets(np.array([0.2, 0.2]), np.array([5.0]))
    assert ruined.upper(0.05) == np.inf
    assert ruined.p_value(0.1) == 1.0


@pytest.mark.parametrize("n", [20, 300, 20_000])
def test_nothing_lost_leaves_little_more_than_the_rule_of_three(n):
    upper = Bets(np.zeros(n), stakes_below(np.full(n, 1 / n))).upper(0.05)
    assert 3 / n <= upper <= 7 / n


def test_unequal_units_are_bounded_by_their_own_range():
    """A hundred units of one example, and one of a hundred: half of what could be lost is in one."""
    largest = np.concatenate([np.full(100, 1 / 200), [0.5]])
    upper = Bets(np.zeros(101), stakes_below(largest)).upper(0.05)
    even = Bets(np.zeros(200), stakes_below(np.full(200, 1 / 200))).upper(0.05)
    assert 10 * even < upper
