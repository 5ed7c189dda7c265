"""Metrics agree with scikit-learn, and what is no metric, no output or no label is refused."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from penjing.core.errors import Exit, Refused
from penjing.core.task import Task
from penjing.measurement.quality import (
    NAMED,
    accuracy,
    all_metrics,
    calibration_error,
    maximized,
    metric_name,
    metric_value,
    per_class_recall,
    per_example,
    reacts,
    top_k,
    weighted_scores,
)
from penjing.measurement.quality_interval import quality_of

RNG = np.random.default_rng(0)
TARGETS = RNG.integers(0, 8, 300)
OUTPUTS = RNG.normal(size=(300, 8)).astype(np.float32)
OUTPUTS[np.arange(300), TARGETS] += 1.5


def task(metric: Any = "accuracy", direction: Any = None) -> Task:
    return Task(train=None, metric=metric, direction=direction)


@pytest.mark.parametrize("name", NAMED)
def test_named_metrics_equal_scikit_learn(name: str):
    predictions = OUTPUTS.argmax(axis=1)
    if name == "accuracy":
        expected = sk.accuracy_score(TARGETS, predictions)
    elif name == "top5":
        expected = sk.top_k_accuracy_score(TARGETS, OUTPUTS, k=5)
    else:
        kind, average = name.split("_")
        expected = getattr(sk, f"{kind}_score")(TARGETS, predictions, average=average, zero_division=0)
    assert metric_value(task(name), OUTPUTS, TARGETS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMED if "_" in n])
def test_weighted_scores_equal_scikit_learn_on_resamples(name: str):
    kind, average = name.split("_")
    targets, predictions = RNG.integers(0, 5, 60), RNG.integers(0, 6, 60)
    picks = RNG.integers(0, 60, (20, 60))
    weights = np.stack([np.bincount(row, minlength=60) for row in picks]).astype(float)
    score = getattr(sk, f"{kind}_score")
    expected = [score(targets[i], predictions[i], average=average, zero_division=0) for i in picks]
    assert weighted_scores(name, predictions, targets, weights) == pytest.approx(expected, abs=1e-12)


def test_top_k_of_any_k_and_its_bounds():
    assert metric_value(task("top_3"), OUTPUTS, TARGETS) == top_k(OUTPUTS, TARGETS, 3)
    assert top_k(OUTPUTS, TARGETS, 8) == 1.0
    with pytest.raises(Refused, match="number of classes"):
        metric_value(task("top9"), OUTPUTS, TARGETS)


def test_per_example_is_right_or_wrong_or_nothing():
    assert per_example(task(), OUTPUTS, TARGETS).mean() == accuracy(OUTPUTS, TARGETS)
    assert per_example(task("top5"), OUTPUTS, TARGETS).mean() == top_k(OUTPUTS, TARGETS, 5)
    assert per_example(task("f1_macro"), OUTPUTS, TARGETS) is None
    assert per_example(task(accuracy, "maximize"), OUTPUTS, TARGETS) is None


class Tensor:
    """Looks like a tensor on another device."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return np.asarray(self.value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array([0.5]), Tensor(0.5), np.array(0.5)])
def test_one_number_in_any_wrapping_is_coerced(value: Any):
    assert metric_value(task(lambda o, t: value, "maximize"), OUTPUTS, TARGETS) == 0.5


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), None, True, np.True_, "0.5", np.zeros(3), {}, [], 1j, Tensor([1, 2])],
)
def test_anything_but_one_number_is_refused_by_name(value: Any):
    def odd_metric(outputs: Any, targets: Any) -> Any:
        return value

    with pytest.raises(Refused, match="metric odd_metric"):
        metric_value(task(odd_metric, "maximize"), OUTPUTS, TARGETS)


def test_a_metric_that_raises_is_refused_with_its_message():
    def broken(outputs: Any, targets: Any) -> float:
        raise KeyError("label")

    with pytest.raises(Refused, match="KeyError: 'label'"):
        metric_value(task(broken, "maximize"), OUTPUTS, TARGETS)


def test_directions():
    assert maximized(task())
    assert not maximized(task(accuracy, "minimize"))
    with pytest.raises(Refused, match="needs a direction"):
        maximized(task(accuracy))
    with pytest.raises(Refused, match="Did you mean 'accuracy'"):
        maximized(task("acuracy"))
    with pytest.raises(Refused, match="f1_macro"):
        maximized(task("f1"))
    with pytest.raises(Refused, match="named metric must be maximized"):
        maximized(task("accuracy", "minimize"))
    assert metric_name(task(accuracy, "maximize")) == "accuracy"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_outputs_never_become_a_class(bad: float):
    outputs = OUTPUTS.copy()
    outputs[[7, 9], 2] = bad
    for call in (
        lambda: metric_value(task(), outputs, TARGETS),
        lambda: all_metrics(outputs, TARGETS),
        lambda: per_example(task(), outputs, TARGETS),
    ):
        with pytest.raises(Refused, match=r"example 7.*2 of 300 examples"):
            call()


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (OUTPUTS[:10], TARGETS),
        (OUTPUTS[:, 0], TARGETS),
        (OUTPUTS, TARGETS + 1),
        (OUTPUTS, TARGETS - 1),
        (OUTPUTS, TARGETS.astype(float)),
        (OUTPUTS, np.eye(8)[TARGETS]),
        (OUTPUTS, TARGETS.astype(str)),
        (OUTPUTS[:0], TARGETS[:0]),
    ],
)
def test_outputs_and_targets_that_do_not_fit_are_refused(outputs: np.ndarray, targets: np.ndarray):
    with pytest.raises(Refused):
        metric_value(task(), outputs, targets)


def test_one_class_leaves_metrics_undefined_not_zero_or_one():
    outputs, targets = OUTPUTS[:20], np.full(20, 3)
    values = all_metrics(outputs, targets)
    assert values["accuracy"] == accuracy(outputs, targets)
    assert values["recall_macro"] is values["f1_weighted"] is None
    with pytest.raises(Refused, match="at least two classes"):
        metric_value(task("f1_macro"), outputs, targets)
    recall = per_class_recall(outputs, targets)
    assert recall["3"] == accuracy(outputs, targets)
    assert recall["0"] is None


def test_per_class_recall_equals_scikit_learn():
    names = tuple("abcdefgh")
    expected = sk.recall_score(TARGETS, OUTPUTS.argmax(axis=1), average=None)
    recall = per_class_recall(OUTPUTS, TARGETS, names)
    assert list(recall) == list(names)
    assert list(recall.values()) == pytest.approx(expected.tolist())
    assert per_class_recall(OUTPUTS[:, 0], TARGETS) == {}


def test_all_metrics_has_what_the_report_shows():
    values = all_metrics(OUTPUTS, TARGETS)
    assert values["f1_macro"] == pytest.approx(sk.f1_score(TARGETS, OUTPUTS.argmax(1), average="macro"))
    assert {"accuracy", "top5", "precision_macro", "recall_weighted", "calibration_error"} <= set(values)
    assert all_metrics(OUTPUTS[:, :1], RNG.normal(size=(300, 1))) == {}


def test_calibration_error_of_known_cases():
    targets = np.array([0, 0, 0, 1])
    sure = np.tile([1.0, 0.0], (4, 1))
    assert calibration_error(sure, targets) == pytest.approx(0.25)
    honest = np.tile([0.75, 0.25], (4, 1))
    assert calibration_error(honest, targets) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(np.log(honest) + 5, targets) == pytest.approx(0.0, abs=1e-12)


def test_a_metric_that_does_not_react_is_noted():
    def constant(outputs: Any, targets: Any) -> float:
        return 1.0

    assert "does not react" in reacts(task(constant, "maximize"), OUTPUTS, TARGETS)
    assert reacts(task(), OUTPUTS, TARGETS) == ""
    assert "same for" in reacts(task(), np.ones((300, 8)), TARGETS)


def test_missing_scikit_learn_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert metric_value(task(), OUTPUTS, TARGETS) > 0.5
    with pytest.raises(Refused, match=r"penjing\[metrics\]") as caught:
        metric_value(task("f1_macro"), OUTPUTS, TARGETS)
    assert caught.value.code is Exit.ENVIRONMENT


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", accuracy], ids=["share", "named", "own"])
def test_the_interval_of_groups_is_that_of_whole_groups(metric: Any):
    """Ten copies of every example, as groups: about the interval of the examples, not of ten times more."""
    many = np.repeat(np.arange(300), 10)
    asked = task(metric, None if isinstance(metric, str) else "maximize")
    single = quality_of(asked, OUTPUTS, TARGETS)
    grouped = quality_of(asked, OUTPUTS[many], TARGETS[many], many)
    wrong = quality_of(asked, OUTPUTS[many], TARGETS[many])
    assert grouped.value == pytest.approx(single.value)
    assert grouped.how == "percentile bootstrap of groups"
    widths = [found.high - found.low for found in (single, grouped, wrong)]
    assert widths[1] == pytest.approx(widths[0], rel=0.25)
    assert widths[2] < 0.5 * widths[1]
