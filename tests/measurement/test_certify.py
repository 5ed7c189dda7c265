"""The certificate is honest: what it certifies holds, and what it cannot know it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penjing.arrays.bootstrap import bootstrap
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate
from penjing.core.task import Task
from penjing.core.verdict import Verdict
from penjing.measurement.certify import certify
from penjing.measurement.paired import PairedBootstrap, PairedProportions, compare
from penjing.measurement.quality import weighted_scores

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
    certificate, _ = certify(scores(base), [("hurt", scores(hurt))], targets, Task(None), 0.05, 0.95, names)
    worst = certificate.worst_class
    assert worst is not None
    assert worst.label == "digit 7"
    assert worst.n == np.count_nonzero(targets == 7)
    assert worst.drop == pytest.approx(25 / worst.n)
    assert worst.low < worst.drop < worst.high
    assert worst.p_holm == pytest.approx(10 * 0.5**25)


def test_top_k_uses_the_paired_test_and_other_metrics_the_bootstrap():
    targets, base = data(300)
    other = scores(broken(targets, base, 4))
    assert isinstance(compare(Task(None, metric="top5"), scores(base), other, targets), PairedProportions)
    assert isinstance(compare(Task(None, metric="f1_macro"), scores(base), other, targets), PairedBootstrap)


def test_the_bootstrap_of_accuracy_agrees_with_the_exact_test_on_the_safe_side():
    def share_right(outputs: np.ndarray, targets: np.ndarray) -> float:
        return float((outputs.argmax(axis=1) == targets).mean())

    targets, base = data(800)
    other = scores(broken(targets, base, lost=14, gained=6))
    exact = compare(Task(None), scores(base), other, targets).bounds(0.95)
    own = Task(None, metric=share_right, direction="maximize")
    booted = compare(own, scores(base), other, targets).bounds(0.95)
    assert booted.value == pytest.approx(exact.value)
    assert exact.high <= booted.high <= exact.high + 0.005
    assert exact.low - 0.005 <= booted.low <= exact.low + 0.001


def test_a_metric_to_be_minimised_drops_when_it_rises():
    def rmse(outputs: np.ndarray, targets: np.ndarray) -> float:
        return float(np.sqrt(np.mean((outputs[:, 0] - targets) ** 2)))

    rng = np.random.default_rng(0)
    targets = rng.normal(size=400)
    base = (targets + rng.normal(size=400) * 0.1)[:, None]
    worse = (targets + rng.normal(size=400) * 0.3)[:, None]
    task = Task(None, metric=rmse, direction="minimize")
    certificate, index = certify(base, [("same", base), ("worse", worse)], targets, task, 0.05)
    assert index == 0
    assert certificate.sequence[1].drop == pytest.approx(0.2, abs=0.03)
    assert certificate.flips is certificate.worst_class is None
    alone, _ = certify(base, [("worse", worse)], targets, task, 0.05)
    assert alone.judge(0.05).status == "not_reached"
    better, index = certify(worse, [("better", base)], targets, task, 0.05)
    assert index == 0
    assert better.drop.high < 0


def test_no_change_in_f1_is_not_taken_for_certainty():
    targets, base = data(200)
    certificate, index = certify(
        scores(base), [("noop", scores(base))], targets, Task(None, metric="f1_macro"), 0.01
    )
    assert index is None
    assert certificate.drop.high >= 1 - 0.05 ** (1 / 200)
    assert "would do" in certificate.judge(0.01).reason


def test_false_acceptances_of_the_bootstrap_at_the_boundary():
    """Macro F1 of three unequal classes; the margin is the true drop, so that every acceptance is false."""
    shares, flip, cases, n, alpha = np.array([0.6, 0.3, 0.1]), 0.06, 500, 200, 0.05
    cells = [(t, p, q) for t in range(3) for p in range(3) for q in range(3)]
    wrong = np.array([[0.9 if a == b else 0.05 for b in range(3)] for a in range(3)])
    move = np.array([[1 - flip if a == b else flip / 2 for b in range(3)] for a in range(3)])
    mass = np.array([shares[t] * wrong[t, p] * move[p, q] for t, p, q in cells])
    target, before, after = np.array(cells).T
    f1 = [float(weighted_scores("f1_macro", x, target, mass[None])[0]) for x in (before, after)]
    true_drop = f1[0] - f1[1]
    rng = np.random.default_rng(0)
    accepted = 0
    for case in range(cases):
        pick = rng.choice(len(cells), n, p=mass)
        t, p, q = target[pick], before[pick], after[pick]

        def drop(weights: np.ndarray, t=t, p=p, q=q) -> np.ndarray:
            return weighted_scores("f1_macro", p, t, weights) - weighted_scores("f1_macro", q, t, weights)

        # `compare` would find a reach of about 3 here, and accept less.
        pair = PairedBootstrap(bootstrap(drop, n, 300, seed=case), reach=1.0, n=n)
        accepted += pair.bounds(1 - alpha).high <= true_drop
    assert accepted / cases <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / cases)


def test_p_value_and_bound_of_the_bootstrap_agree():
    targets, base = data(500)
    pair = compare(
        Task(None, metric="f1_weighted"), scores(base), scores(broken(targets, base, 6, 3)), targets
    )
    high = pair.bounds(0.95).high
    assert pair.p_value(high + 1e-3, 0.05) <= 0.05 < pair.p_value(high - 1e-3, 0.05)
    assert pair.needed(0.05, 0.95) is not None
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
