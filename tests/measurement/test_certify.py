"""The certificate is honest: what it certifies holds, and what it cannot know it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penjing.core.errors import Refused
from penjing.core.measurement import Estimate
from penjing.core.task import Task
from penjing.core.verdict import Verdict
from penjing.measurement.certify import certify
from penjing.measurement.class_averages import PairedClasses
from penjing.measurement.compare import compare
from penjing.measurement.paired import PairedBootstrap, PairedProportions, PairedSum

CLASSES = 10


def scores(predictions: np.ndarray) -> np.ndarray:
    return np.eye(CLASSES, dtype=np.float32)[predictions] * 4


def data(n: int, share_right: float = 0.95, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Targets and the baseline's predictions."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, n)
    return targets, np.where(rng.random(n) < share_right, targets, (targets + 1) % CLASSES)


def broken(
    targets: np.ndarray, predictions: np.ndarray, lost: int, gained: int = 0, seed: int = 1
) -> np.ndarray:
    """Predictions of a candidate that loses and gains so many."""
    rng = np.random.default_rng(seed)
    changed = predictions.copy()
    right, wrong = np.flatnonzero(predictions == targets), np.flatnonzero(predictions != targets)
    for index in rng.choice(right, lost, replace=False):
        changed[index] = (targets[index] + 3) % CLASSES
    for index in rng.choice(wrong, gained, replace=False):
        changed[index] = targets[index]
    return changed


def test_a_candidate_that_changes_nothing_is_certified_when_there_are_enough_examples():
    targets, base = data(1000)
    certificate, index = certify(scores(base), [("noop", scores(base))], targets, Task(None), 0.005)
    assert index == 0
    assert certificate.judge(0.005).status == "reached"
    assert certificate.drop.value == 0 < certificate.drop.high < 0.005
    assert certificate.flips is not None
    assert certificate.flips.total == 0


def test_the_same_candidate_on_few_examples_is_inconclusive_and_says_how_many_would_do():
    targets, base = data(200)
    certificate, index = certify(scores(base), [("noop", scores(base))], targets, Task(None), 0.005)
    limit = certificate.judge(0.005)
    assert index is None
    assert limit.status == "inconclusive"
    assert "cannot certify a drop of at most 0.5% with 200 examples; 610 would do" in limit.reason
    assert certificate.smallest_certifiable_drop == pytest.approx(0.015, abs=5e-4)


def test_pure_noise_is_certified_at_a_margin_it_deserves_and_not_below():
    targets, base = data(4000)
    noisy = scores(broken(targets, base, lost=20, gained=20))
    certificate, index = certify(scores(base), [("noise", noisy)], targets, Task(None), 0.01)
    assert index == 0
    assert certificate.flips is not None
    assert (certificate.flips.correct_to_wrong, certificate.flips.wrong_to_correct) == (20, 20)
    tight, index = certify(scores(base), [("noise", noisy)], targets, Task(None), 0.001)
    assert index is None
    assert tight.judge(0.001).status == "inconclusive"
    assert tight.needed_n is not None
    assert tight.needed_n > 4000


def test_a_clearly_worse_candidate_is_not_reached():
    targets, base = data(2000)
    worse = scores(broken(targets, base, lost=100))
    certificate, index = certify(scores(base), [("worse", worse)], targets, Task(None), 0.01)
    limit = certificate.judge(0.01)
    assert index is None
    assert limit.status == "not_reached"
    assert limit.low is not None
    assert limit.low > 0.01
    assert certificate.needed_n is None


def test_a_lucky_candidate_on_few_examples_is_not_believed():
    targets, base = data(150)
    lucky = scores(broken(targets, base, lost=2, gained=3))
    certificate, index = certify(scores(base), [("lucky", lucky)], targets, Task(None), 0.01)
    assert certificate.drop.value < 0
    assert index is None
    assert certificate.judge(0.01).status == "inconclusive"


def test_testing_stops_at_the_first_failure_even_if_a_later_one_would_pass():
    targets, base = data(2000)
    candidates = [
        ("safe", scores(base)),
        ("mild", scores(broken(targets, base, lost=5))),
        ("worse", scores(broken(targets, base, lost=60))),
        ("good again", scores(base)),
    ]
    certificate, index = certify(scores(base), candidates, targets, Task(None), 0.01)
    assert index == certificate.position == 1
    assert certificate.candidate == "mild"
    assert [step.certified for step in certificate.sequence] == [True, True, False, False]
    assert [step.p_value is None for step in certificate.sequence] == [False, False, False, True]
    assert certificate.sequence[3].reason == "not tested: the sequence stopped at worse"
    assert certificate.drop.high == certificate.sequence[1].upper <= 0.01


def test_without_a_limit_there_are_intervals_and_no_test():
    targets, base = data(500)
    certificate, index = certify(
        scores(base),
        [("a", scores(base)), ("b", scores(broken(targets, base, 9)))],
        targets,
        Task(None),
        None,
    )
    assert index is None
    assert certificate.candidate == "b"
    assert certificate.drop.low < 9 / 500 < certificate.drop.high
    assert all(step.p_value is None and not step.certified for step in certificate.sequence)
    assert certificate.needed_n is None


def test_the_worst_class_is_found_with_bounds_for_all_classes_at_once():
    targets, base = data(3000, share_right=1.0)
    hurt = base.copy()
    victims = np.flatnonzero(targets == 7)[:25]
    hurt[victims] = 2
    names = tuple(f"digit {k}" for k in range(10))
    task = Task(None, class_names=names)
    certificate, _ = certify(scores(base), [("hurt", scores(hurt))], targets, task, 0.05)
    worst = certificate.worst_class
    assert worst is not None
    assert worst.label == "digit 7"
    assert worst.n == np.count_nonzero(targets == 7)
    assert worst.drop == pytest.approx(25 / worst.n)
    assert worst.low < worst.drop < worst.high
    assert worst.p_holm == pytest.approx(10 * 0.5**25)


def test_every_metric_has_the_test_that_is_valid_for_it():
    targets, base = data(300)
    other = scores(broken(targets, base, 4))

    def kind(metric, **fields):
        return type(compare(Task(None, metric=metric, **fields), scores(base), other, targets))

    for exact in ("accuracy", "top5", "precision_micro", "recall_micro", "f1_micro", "recall_weighted"):
        assert kind(exact) is PairedProportions
    assert kind("recall_macro") is PairedSum
    for ratio in ("precision_macro", "precision_weighted", "f1_macro", "f1_weighted"):
        assert kind(ratio) is PairedClasses
    assert kind(share_right, direction="maximize") is PairedBootstrap
    assert kind(share_right, direction="maximize", metric_range=(0, 1)) is PairedSum


def share_right(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float((outputs.argmax(axis=1) == targets).mean())


def rmse(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.sqrt(np.mean((outputs[:, 0] - targets) ** 2)))


def median_error(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.median(np.abs(outputs[:, 0] - targets)))


def perplexity(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.exp(np.mean(np.abs(outputs[:, 0] - targets))))


def test_betting_on_accuracy_agrees_with_the_exact_test_on_the_safe_side():
    targets, base = data(800)
    other = scores(broken(targets, base, lost=14, gained=6))
    exact = compare(Task(None), scores(base), other, targets).bounds(0.95)
    own = Task(None, metric=share_right, direction="maximize", metric_range=(0, 1))
    bet = compare(own, scores(base), other, targets).bounds(0.95)
    assert bet.value == pytest.approx(exact.value)
    assert exact.high <= bet.high <= exact.high + 0.015
    assert exact.low - 0.015 <= bet.low <= exact.low


def regression(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, good predictions and predictions with more noise."""
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=n)
    first, second = (targets + rng.normal(size=n) * s for s in (0.1, noise))
    return targets, first[:, None], second[:, None]


def test_a_metric_to_be_minimised_drops_when_it_rises():
    targets, base, worse = regression(2000, 0.3)
    task = Task(None, metric=rmse, direction="minimize", metric_range=(0, 1))
    certificate, index = certify(base, [("same", base), ("worse", worse)], targets, task, 0.05)
    assert index == 0
    assert certificate.sequence[1].drop == pytest.approx(0.2, abs=0.03)
    assert certificate.flips is certificate.worst_class is None
    alone, _ = certify(base, [("worse", worse)], targets, task, 0.05)
    assert alone.judge(0.05).status == "not_reached"
    better, index = certify(worse, [("better", base)], targets, task, 0.05)
    assert index == 0
    assert better.drop.high < 0


@pytest.mark.parametrize(
    ("metric", "limits", "exponent"), [(rmse, (0, 1), 2), (perplexity, (1, 10), 0), (perplexity, (1, 1.2), 0)]
)
def test_the_bounds_of_an_average_taken_back_contain_its_drop(metric, limits, exponent):
    targets, base, worse = regression(3000, 0.12)
    clipped = np.clip(np.abs(np.stack([base[:, 0], worse[:, 0]]) - targets), 0, 1)
    if exponent:
        first, second = np.sqrt((clipped**2).mean(axis=1))
    else:
        first, second = np.exp(np.minimum(clipped, math.log(limits[1])).mean(axis=1))
    task = Task(None, metric=metric, direction="minimize", metric_range=limits)
    drop = compare(task, base, worse, targets).bounds(0.95)
    assert drop.value == pytest.approx(second - first)
    assert drop.low < drop.value < drop.high < 0.2
    turned = compare(task, worse, base, targets).bounds(0.95)
    assert turned.value == pytest.approx(-drop.value)
    pair = compare(task, base, worse, targets)
    assert pair.p_value(drop.high * 1.02, 0.05) <= 0.05 < pair.p_value(drop.high * 0.98, 0.05)
    assert pair.smallest(0.95) < drop.high
    assert pair.needed(0.2, 0.95) is not None


def test_values_beyond_the_range_are_clipped_and_counted():
    targets, base, worse = regression(500, 0.1)
    worse[:3] += 50
    task = Task(None, metric=rmse, direction="minimize", metric_range=(0, 1))
    certificate, _ = certify(base, [("rare", worse)], targets, task, 0.5)
    assert "3 values beyond it were clipped" in certificate.method
    assert certificate.drop.high < 1


@pytest.mark.parametrize(
    ("metric", "fields", "reason"),
    [
        (rmse, {}, "set Task(metric_range="),
        (median_error, {"metric_range": (0, 1)}, "no mean over examples"),
        (perplexity, {"metric_range": (0, 9)}, "a lowest value above 0"),
    ],
)
def test_what_has_no_bound_is_not_certified_and_says_what_would_give_one(metric, fields, reason):
    """A metric of the user's without a range, one that is no mean, and a product that may be 0."""
    targets, base, _ = regression(5000, 0.1)
    task = Task(None, metric=metric, direction="minimize", **fields)
    certificate, index = certify(base, [("same", base)], targets, task, 0.5)
    limit = certificate.judge(0.5)
    assert index is None
    assert limit.status == "inconclusive"
    assert "no bound on the metric" in limit.reason
    assert reason in limit.reason
    assert certificate.smallest_certifiable_drop is certificate.needed_n is None
    assert certificate.judge(0.9).status == "inconclusive"
    assert "an indication, no bound" in str(Verdict.of({"max_drop": limit}, certificate))


def test_a_class_without_examples_leaves_averages_over_classes_without_a_bound():
    targets, base = data(4000)
    kept = targets != 7
    targets, base = targets[kept], np.where(base[kept] == 7, 6, base[kept])
    for metric in ("recall_macro", "f1_macro", "precision_weighted"):
        certificate, index = certify(
            scores(base), [("same", scores(base))], targets, Task(None, metric=metric), 0.2
        )
        assert index is None
        assert "no test example is of class 7" in certificate.judge(0.2).reason
    _, index = certify(scores(base), [("same", scores(base))], targets, Task(None), 0.2)
    assert index == 0


def test_no_change_in_f1_is_not_taken_for_certainty():
    targets, base = data(200)
    certificate, index = certify(
        scores(base), [("noop", scores(base))], targets, Task(None, metric="f1_macro"), 0.01
    )
    assert index is None
    assert certificate.drop.high >= 1 - 0.05 ** (1 / 200)
    assert "would do" in certificate.judge(0.01).reason


def test_examples_in_groups_count_by_group():
    targets, base = data(200)
    many, pattern = np.repeat(np.arange(200), 20), broken(targets, base, lost=4, gained=2)
    task = Task(None)
    alone, index = certify(
        scores(base[many]), [("c", scores(pattern[many]))], targets[many], task, 0.025, groups=None
    )
    assert index == 0  # 4,000 examples, if they were that many
    grouped, index = certify(
        scores(base[many]), [("c", scores(pattern[many]))], targets[many], task, 0.025, groups=many
    )
    assert index is None
    assert (grouped.n, grouped.groups, alone.groups) == (4000, 200, None)
    assert grouped.worst_class is None
    assert grouped.drop.value == pytest.approx(alone.drop.value)
    single = compare(task, scores(base), scores(pattern), targets)
    exact = single.bounds(0.95)
    assert exact.high <= grouped.drop.high <= exact.high + 0.03
    everyone = compare(task, scores(base), scores(pattern), targets, np.arange(200))
    assert isinstance(everyone, PairedProportions)


@pytest.mark.parametrize("metric", ["recall_macro", "precision_macro", "f1_macro", "f1_weighted"])
def test_groups_widen_the_bounds_of_averages_over_classes(metric):
    targets, base = data(2000)
    after = broken(targets, base, lost=8, gained=6)
    groups = np.arange(2000) // 4
    task = Task(None, metric=metric)
    alone = compare(task, scores(base), scores(after), targets).bounds(0.95)
    grouped = compare(task, scores(base), scores(after), targets, groups).bounds(0.95)
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.low < alone.low < alone.value < alone.high < grouped.high < 1


@pytest.mark.parametrize("metric", ["f1_weighted", "precision_macro", "recall_macro"])
def test_p_value_and_bound_of_averages_over_classes_agree(metric):
    targets, base = data(3000)
    pair = compare(Task(None, metric=metric), scores(base), scores(broken(targets, base, 6, 3)), targets)
    high = pair.bounds(0.95).high
    assert pair.p_value(high + 1e-3, 0.05) <= 0.05 < pair.p_value(high - 1e-3, 0.05)
    assert pair.needed(0.2, 0.95) is not None
    assert pair.needed(0.0, 0.95) is None


def test_nothing_to_certify_and_nan_are_refused():
    targets, base = data(50)
    with pytest.raises(Refused, match="at least one candidate"):
        certify(scores(base), [], targets, Task(None), 0.01)
    bad = scores(base)
    bad[3, 3] = np.nan
    for metric in ("accuracy", "f1_macro"):
        with pytest.raises(Refused, match="outputs must be finite"):
            certify(scores(base), [("nan", bad)], targets, Task(None, metric=metric), 0.01)


def test_the_certificate_is_plain_data_and_reads_as_text():
    targets, base = data(2000)
    certificate, _ = certify(
        scores(base), [("int8", scores(broken(targets, base, 4, 1)))], targets, Task(None), 0.01
    )
    quality = Estimate(value=0.95, low=0.94, high=0.96, n=2000)
    verdict = Verdict.of({"max_drop": certificate.judge(0.01, quality)}, certificate, ("a note",))
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    text = str(verdict)
    assert text.startswith("Verdict: reached")
    assert "accuracy 0.95" in text
    assert "5 (4 right to wrong, 1 wrong to right)" in text
    assert text.endswith("note: a note")
