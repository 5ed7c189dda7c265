"""The search for a strategy, against runs whose ends are known."""

import math

import pytest

from penjing.core.errors import Refused
from penjing.planners.halving import PlannedRun, RunResult, SearchSpace, check_optimizers, halving
from penjing.train.strategy import Strategy

pytest.importorskip("optuna", reason="the extra tune is not installed")

RATES = {"sgd": (0.01, 1.0), "adamw": (1e-4, 1e-2)}


def space(**fields):
    own = {
        "base": Strategy(batch_size=64),
        "rates": RATES,
        "examples": 10_000,
        "smooths": True,
        "seconds": 500.0,
    }
    return SearchSpace(**(own | fields))


def walk(space, end):
    """Run the search against a function of a run that says how it ends; return the runs with their ends."""
    said, made = [], []
    planner = halving(space, said.append)
    try:
        run = next(planner)
        while True:
            made.append((run, end(run)))
            run = planner.send(made[-1][1])
    except StopIteration:
        return made, said


def model(run: PlannedRun) -> RunResult:
    """Quality grows with time, and more the nearer the rate is to sgd's 0.1; the goal is 0.9."""
    miss = abs(math.log10(run.strategy.peak_lr / 0.1)) + (run.strategy.optimizer != "sgd")
    needed = 60 * (1 + miss)
    quality = min(1.0, 0.9 * run.seconds / needed)
    reached = needed if quality >= 0.9 else None
    return RunResult(quality=quality, reached_s=reached, spent_s=run.seconds)


def test_rounds_grow_threefold_and_keep_the_best_third():
    made, said = walk(space(), model)
    first = [pair for pair in made if pair[0].round == 0]
    second = [pair for pair in made if pair[0].round == 1]
    assert [run.seconds for run, _ in first] == [10.0] * 9
    assert [run.seconds for run, _ in second] == [30.0] * 3
    best = sorted(first, key=lambda pair: -pair[1].quality)[:3]
    assert [run.strategy for run, _ in second] == [run.strategy for run, _ in best]
    assert not said


def test_the_time_that_the_goal_needs_is_narrowed_down():
    made, _ = walk(space(), model)
    reached = [(run, ended) for run, ended in made if ended.reached_s is not None]
    assert reached
    quickest = min(ended.reached_s for _, ended in reached)
    strategy = next(run.strategy for run, ended in reached if ended.reached_s == quickest)
    short = [run.seconds for run, ended in made if run.strategy == strategy and ended.reached_s is None]
    assert max(short) > quickest / 3
    assert sum(run.seconds for run, _ in made) <= 1.05 * 500


def test_the_same_answers_give_the_same_search():
    assert walk(space(seed=3), model) == walk(space(seed=3), model)
    assert walk(space(seed=3), model)[0] != walk(space(seed=4), model)[0]


def test_a_goal_out_of_reach_ends_with_the_time_and_says_so():
    def poor(run):
        return RunResult(quality=0.1, reached_s=None, spent_s=run.seconds)

    made, said = walk(space(), poor)
    assert sum(run.seconds for run, _ in made) <= 500
    assert max(run.seconds for run, _ in made) > 100
    assert any("the time is over" in line.text for line in said)


def test_runs_that_were_refused_do_not_go_on():
    def fails(run):
        if run.strategy.optimizer == "adamw":
            return RunResult(quality=None, reached_s=None, spent_s=1.0)
        return model(run)

    made, _ = walk(space(), fails)
    assert all(run.strategy.optimizer == "sgd" for run, _ in made if run.round > 0)
    nothing, said = walk(space(), lambda run: RunResult(quality=None, reached_s=None, spent_s=1.0))
    assert len(nothing) == 9
    assert said


def test_a_metric_that_is_to_be_small_is_minimized():
    def error(run):
        ended = model(run)
        return RunResult(quality=1 - ended.quality, reached_s=None, spent_s=ended.spent_s)

    made, _ = walk(space(up=False), error)
    first = sorted((pair for pair in made if pair[0].round == 0), key=lambda pair: pair[1].quality)
    second = [run.strategy for run, _ in made if run.round == 1]
    assert second == [run.strategy for run, _ in first[:3]]


def test_proposals_keep_to_the_space():
    made, _ = walk(space(examples=300, smooths=False), model)
    assert {run.strategy.label_smoothing for run, _ in made} == {0.0}
    assert {run.strategy.batch_size for run, _ in made} == {32}
    assert {run.strategy.optimizer for run, _ in made} <= set(RATES)
    assert all(1e-6 <= run.strategy.weight_decay <= 1e-2 for run, _ in made)
    fixed = Strategy(batch_size=64, mixup=0.2, flip=True)
    made, _ = walk(space(base=fixed), model)
    assert all(run.strategy.mixup == 0.2 and run.strategy.flip for run, _ in made)


def test_unknown_optimizers_are_refused():
    with pytest.raises(Refused, match="must name known optimizers"):
        check_optimizers(["sdg"])
    with pytest.raises(Refused, match="must name known optimizers"):
        check_optimizers([])
