"""The first planner against synthetic networks whose quality and latency are known functions of the plan."""

import pytest

import penjing as pj
from penjing.core.budget import Budget
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured
from penjing.core.plan import chain, plan_from_json, plan_to_json
from penjing.core.trial import Trial, find_broken_limits
from penjing.planners.bisection import Bisection, Lever, Setting, bisect
from penjing.planners.floor import FLOOR_RATIO, plan_smallest_model
from penjing.planners.recipes import choose_recipes_by_rule

REPAIR = chain(pj.LeastSquares(), pj.ReestimateBatchNorm())
REPAIRED = ["PruneChannels", "LeastSquares", "ReestimateBatchNorm"]
STATIC, DYNAMIC = chain(pj.Int8Static(), pj.CorrectBias()), chain(pj.Int8Dynamic())


def measurement(ms):
    def estimate(value):
        return Estimate(value=value, low=value, high=value, n=1)

    latency = Latency(
        p50_ms=estimate(ms),
        p95_ms=estimate(ms),
        p99_ms=estimate(ms),
        throughput_per_s=estimate(1 / ms),
        batch=1,
        threads=1,
        calls=1,
        rounds=1,
    )
    nothing = NotMeasured(reason="synthetic")
    return Measurement(
        name="",
        target="",
        split="valid",
        metric="accuracy",
        quality=nothing,
        latency=latency,
        memory_bytes=nothing,
        size_bytes=int(1000 * ms),
    )


class World:
    """Answers plans: pruning loses quality above `knee`, precisions and roundings have their own price."""

    def __init__(
        self,
        budget,
        *,
        knee=0.6,
        int8_drop=0.0,
        int8_speed=0.5,
        flips=0.0,
        rounding=None,
        fails=(),
        per_epoch=0.0,
        depth_knee=0.3,
        depth_slope=1.0,
    ):
        self.budget, self.knee, self.int8_drop, self.int8_speed = budget, knee, int8_drop, int8_speed
        self.flips, self.rounding, self.fails, self.per_epoch = flips, rounding or {}, set(fails), per_epoch
        self.depth_knee, self.depth_slope = depth_knee, depth_slope
        self.seen = []
        self.baseline = self.answer(())
        self.seen.clear()

    def answer(self, plan):
        self.seen.append(plan)
        cut = next((m for m in plan if isinstance(m, pj.PruneChannels)), None)
        epochs = sum(m.epochs for m in plan if isinstance(m, pj.Distill))
        ratio = cut.ratio if cut else 0.0
        depth = next((m.ratio for m in plan if isinstance(m, pj.RemoveBlocks)), 0.0)
        data, name = plan_to_json(plan), str(len(self.seen))
        if ratio in self.fails:
            return Trial(key=name, name=name, plan=data, status="failed", reason="killed")
        int8 = bool({type(m) for m in plan} & {pj.Int8Static, pj.Int8Dynamic})
        drop = max(0.0, ratio - self.knee - self.per_epoch * epochs) + self.int8_drop * int8
        drop += max(0.0, depth - self.depth_knee) * self.depth_slope
        ms = (
            (1.05 - ratio)
            * (1 - depth)
            * (self.int8_speed if int8 else 1)
            * (self.rounding.get(cut.round_to, 1) if cut else 1)
        )
        now = measurement(ms)
        base = now if not plan else self.baseline.measurement
        return Trial(
            key=name,
            name=name,
            plan=data,
            status="done",
            measurement=now,
            drop=drop,
            flips=self.flips,
            breaks=find_broken_limits(self.budget, now, base, drop),
        )

    def run(
        self,
        options=None,
        precisions=(),
        prunable=True,
        trainable=True,
        repair=REPAIR,
        n_test=10_000,
        widths=(),
        blocks=0,
        ordered=False,
    ):
        setting = Setting(
            self.budget,
            self.baseline,
            precisions,
            prunable,
            repair,
            trainable,
            n_test,
            widths=widths,
            blocks=blocks,
            ordered=ordered,
        )
        planner, trials = bisect(setting, options), []
        try:
            plan = next(planner)
            while True:
                trials.append(self.answer(plan))
                plan = planner.send(trials[-1])
        except StopIteration:
            return trials, setting


def cut_of(trial):
    return next((m for m in plan_from_json(trial.plan) if isinstance(m, pj.PruneChannels)), None)


def ratios(trials):
    return [cut.ratio for t in trials if (cut := cut_of(t))]


def kinds(trial):
    return [type(m).__name__ for m in plan_from_json(trial.plan)]


@pytest.mark.parametrize("knee", [0.05, 0.3, 0.55, 0.8])
@pytest.mark.parametrize("resolution", [0.2, 0.02])
def test_it_finds_the_largest_ratio_that_passes(knee, resolution):
    budget = Budget(max_drop="1%")
    trials, setting = World(budget, knee=knee).run(Bisection(resolution=resolution, patience=0))
    passing = [r for r, t in zip(ratios(trials), trials, strict=True) if setting.passes(t)]
    assert knee + 0.01 - resolution <= max(passing, default=0.0) <= knee + 0.01
    assert len(trials) <= 7


def test_the_margin_of_the_coming_certificate_is_part_of_the_question():
    budget = Budget(max_drop="5%")
    sure, _ = World(budget, knee=0.5).run(Bisection(resolution=0.01, patience=0))
    noisy, setting = World(budget, knee=0.5, flips=0.1).run(
        Bisection(resolution=0.01, patience=0), n_test=400
    )
    margin = 1.645 * (0.1 / 400) ** 0.5
    best = max(r for r, t in zip(ratios(noisy), noisy, strict=True) if setting.passes(t))
    assert best == pytest.approx(0.55 - margin, abs=0.01)
    assert best < max(r for r, t in zip(ratios(sure), sure, strict=True) if setting.passes(t))


def test_a_stricter_confidence_passes_less():
    trial = World(Budget(), knee=0.4, flips=0.1).answer(chain(pj.PruneChannels(0.42)))
    settings = [
        Setting(Budget(max_drop="5%", confidence=c), trial, (), True, REPAIR, True, 400) for c in (0.9, 0.99)
    ]
    assert [s.passes(trial) for s in settings] == [True, False]


def test_precision_is_kept_where_it_is_faster_and_keeps_the_quality():
    trials, _ = World(Budget(max_drop="1%")).run(precisions=(STATIC,))
    assert plan_from_json(trials[0].plan) == STATIC
    pruned = [*REPAIRED, "Distill", "Int8Static", "CorrectBias"]
    assert all(kinds(t) == pruned for t in trials[1:])


@pytest.mark.parametrize("world", [{"int8_drop": 0.05}, {"int8_speed": 1.5}])
def test_it_falls_back_to_float_where_int8_breaks_the_quality_or_is_slower(world):
    trials, _ = World(Budget(max_drop="1%"), **world).run(precisions=(DYNAMIC, STATIC))
    assert [plan_from_json(t.plan) for t in trials[:2]] == [DYNAMIC, STATIC]
    assert all(kinds(t) == [*REPAIRED, "Distill"] for t in trials[2:])


def test_of_measured_recipes_the_first_that_keeps_the_quality_is_the_last_one_tried():
    world = World(Budget(max_drop="1%"))
    trials, _ = world.run(precisions=(STATIC, DYNAMIC), ordered=True, prunable=False)
    assert [plan_from_json(t.plan) for t in trials] == [STATIC]
    lossy, _ = World(Budget(max_drop="1%"), int8_drop=0.05).run(
        precisions=(STATIC, DYNAMIC), ordered=True, prunable=False
    )
    assert [plan_from_json(t.plan) for t in lossy] == [STATIC, DYNAMIC]
    slower, _ = World(Budget(max_drop="1%"), int8_speed=1.5).run(
        precisions=(STATIC, DYNAMIC), ordered=True, prunable=False
    )
    assert len(slower) == 2, "slower in its trial than in the probe: the next one may be faster"
    large, _ = World(Budget(max_drop="1%", size="20%")).run(
        precisions=(STATIC, DYNAMIC), ordered=True, prunable=False
    )
    assert len(large) == 2, "one that is still too large is not the last"


def test_a_model_offers_what_it_offers():
    world = World(Budget(max_drop="1%"))
    assert [kinds(t) for t in world.run(prunable=False, precisions=(STATIC,))[0]] == [
        ["Int8Static", "CorrectBias"]
    ]
    assert world.run(prunable=False)[0] == []
    assert {tuple(kinds(t)) for t in world.run(repair=())[0]} == {("PruneChannels", "Distill")}
    assert {tuple(kinds(t)) for t in world.run(trainable=False)[0]} == {tuple(REPAIRED)}


def test_without_a_limit_on_quality_the_smallest_ratio_within_the_cost_is_found():
    options = Bisection(resolution=0.02, patience=0)
    trials, _ = World(Budget(latency="40%"), knee=0.1).run(options)
    feasible = [r for r, t in zip(ratios(trials), trials, strict=True) if t.feasible]
    needed = 1.05 - 0.4 * 1.05
    assert needed <= min(feasible) <= needed + 0.02


def test_patience_trains_the_smallest_ratio_that_failed_longer():
    options = Bisection(epochs=2, patience=2, resolution=0.1)
    trials, setting = World(Budget(max_drop="1%"), knee=0.6).run(options)
    failed = min(r for r, t in zip(ratios(trials), trials, strict=True) if not setting.passes(t))
    assert ratios(trials)[-2:] == [failed, failed]
    epochs = [next(m.epochs for m in plan_from_json(t.plan) if isinstance(m, pj.Distill)) for t in trials]
    assert epochs[-2:] == [4, 8]
    assert set(epochs[:-2]) == {2}


def test_patience_ends_with_success_and_comes_only_where_it_can_help():
    options = Bisection(epochs=2, patience=3, resolution=0.1)
    trials, setting = World(Budget(max_drop="1%"), knee=0.5, per_epoch=0.02).run(options)
    assert setting.passes(trials[-1])
    assert not any(
        setting.passes(t) for t in trials if ratios([t]) == ratios(trials[-1:]) and t is not trials[-1]
    )
    untrainable, _ = World(Budget(max_drop="1%")).run(options, trainable=False)
    assert len(set(ratios(untrainable))) == len(ratios(untrainable))


def test_a_ratio_that_crashed_is_not_trained_longer():
    trials, _ = World(Budget(max_drop="1%"), knee=0.9, fails={0.5}).run(Bisection(resolution=0.3, patience=1))
    assert ratios(trials) == [0.5, 0.25]


def test_failed_trials_count_as_too_much():
    trials, setting = World(Budget(max_drop="1%"), knee=0.9, fails={0.5, 0.375}).run()
    assert [t.status for t in trials] == ["failed", "done", "failed", "done"]
    assert max(r for r, t in zip(ratios(trials), trials, strict=True) if setting.passes(t)) < 0.375
    broken_world = World(Budget(max_drop="1%"), fails={0.5, 0.25, 0.125, 0.062})
    assert all(t.status == "failed" for t in broken_world.run()[0])


def test_pruning_that_the_clock_does_not_reward_goes_no_further():
    class Flat(World):
        def answer(self, plan):
            trial = super().answer(plan)
            slow = measurement(1.05 if not plan else 1.2)
            return trial.model_copy(update={"measurement": slow})

    trials, _ = Flat(Budget(max_drop="1%"), knee=0.9).run(Bisection(patience=1))
    assert ratios(trials) == [0.5, 0.25, 0.125, 0.062]


def test_roundings_are_compared_on_the_clock_without_training():
    options = Bisection(round_to=(4, 8, 16), patience=0)
    trials, _ = World(Budget(max_drop="1%"), rounding={4: 1.2, 8: 0.8, 16: 1.0}).run(options)
    assert [cut_of(t).round_to for t in trials[:3]] == [4, 8, 16]
    assert all(kinds(t) == REPAIRED for t in trials[:3])
    assert {cut_of(t).round_to for t in trials[3:]} == {8}
    nearly, _ = World(Budget(max_drop="1%"), rounding={4: 1.0, 8: 1.01, 16: 1.04}).run(options)
    assert {cut_of(t).round_to for t in nearly[3:]} == {16}


def test_ratios_that_come_to_the_same_structure_are_tried_once():
    world = World(Budget(max_drop="1%"), knee=0.9)
    options = Bisection(round_to=(16,), resolution=0.02)
    trials, _ = world.run(options, widths=(16, 32, 32))
    structures = [Lever("l2", 16, (16, 32, 32)).structure(ratio) for ratio in ratios(trials)]
    assert structures == [(16, 16, 16)], "blocks of 16 leave one way to shrink 16, 32, 32"


def depths(trials):
    return [m.ratio for t in trials for m in plan_from_json(t.plan) if isinstance(m, pj.RemoveBlocks)]


def test_levers_are_tried_untrained_and_the_cheapest_comes_first():
    options = Bisection(compare=True, patience=0, resolution=0.1)
    for slope, first in ((0.1, "RemoveBlocks"), (3.0, "PruneChannels")):
        world = World(Budget(max_drop="1%"), knee=0.4, depth_slope=slope)
        trials, setting = world.run(options, blocks=20)
        assert [kinds(t)[0] for t in trials[:2]] == ["PruneChannels", "RemoveBlocks"]
        assert not any("Distill" in kinds(t) for t in trials[:2])
        assert kinds(trials[2])[0] == first
        assert all("Distill" in kinds(t) for t in trials[2:])
        best = min((t for t in trials if setting.passes(t)), key=lambda t: t.latency_ms)
        assert {"RemoveBlocks", "PruneChannels"} <= set(kinds(best)), (
            "the second lever goes on top of the first"
        )
        assert kinds(best)[:2] == ["RemoveBlocks", "PruneChannels"]


def test_depth_is_counted_in_whole_blocks():
    options = Bisection(compare=True, patience=0, resolution=0.02)
    trials, _ = World(Budget(max_drop="1%"), depth_knee=0.5).run(options, prunable=False, blocks=4)
    assert [Lever("l2", None, blocks=4).structure(r) for r in depths(trials)] == [(2,), (3,)]
    assert World(Budget(max_drop="1%")).run(options, prunable=False, blocks=1)[0] == []
    without = World(Budget(max_drop="1%")).run(Bisection(compare=False), blocks=4)[0]
    assert depths(without) == []


def test_a_lever_that_the_clock_does_not_reward_comes_last():
    class Deep(World):
        def answer(self, plan):
            trial = super().answer(plan)
            if not any(isinstance(m, pj.PruneChannels) for m in plan):
                return trial
            return trial.model_copy(update={"measurement": measurement(1.04)})

    options = Bisection(compare=True, patience=0, resolution=0.2)
    trials, _ = Deep(Budget(max_drop="1%"), knee=0.9, depth_slope=3.0).run(options, blocks=8)
    assert kinds(trials[2])[0] == "RemoveBlocks"


@pytest.mark.parametrize(
    "wrong", [{"first": 0}, {"first": 1}, {"resolution": 0}, {"epochs": 0}, {"patience": -1}, {"score": "l3"}]
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Bisection(**wrong)


def test_the_floor_is_the_smallest_model_that_can_be_made():
    assert plan_smallest_model((STATIC,), prunable=True) == chain(
        pj.PruneChannels(FLOOR_RATIO), pj.Int8Static()
    )
    assert plan_smallest_model((), prunable=True) == chain(pj.PruneChannels(FLOOR_RATIO))
    assert plan_smallest_model((DYNAMIC,), prunable=False) == DYNAMIC
    smooth = chain(pj.SmoothActivations(), pj.Int8Static(), pj.CorrectBias())
    assert plan_smallest_model((smooth,), prunable=False) == smooth[:2]
    assert plan_smallest_model((), prunable=False) is None


def test_recipes_follow_the_layers_and_the_target():
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("torch", reason="the extra torch is not installed")
    assert choose_recipes_by_rule(["conv", "batchnorm", "linear"], pj.Target()) == (STATIC,)
    assert choose_recipes_by_rule(["depthwise"], pj.Target()) == (STATIC,)
    assert choose_recipes_by_rule(["linear", "batchnorm"], pj.Target()) == (DYNAMIC, STATIC)
    smoothed = chain(pj.SmoothActivations(), pj.Int8Static(observer="minmax"), pj.CorrectBias())
    assert choose_recipes_by_rule(["linear", "other"], pj.Target()) == (DYNAMIC, smoothed)
    assert choose_recipes_by_rule(["embedding", "linear", "other"], pj.Target("openvino")) == (smoothed,)
    assert choose_recipes_by_rule(["embedding"], pj.Target()) == ()
    assert choose_recipes_by_rule(["conv"], pj.Target("torch")) == ()
