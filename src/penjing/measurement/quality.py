"""Quality of outputs against targets: named metrics, the user's own, and what goes into the report.

Outputs are `[n, classes]` scores (logits or probabilities) and targets `[n]` class indices, except for a
metric of the user's, which receives both as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Exit, Refused, nearest
from penjing.core.task import Task

Array = NDArray[Any]
Metric = Callable[[Array, Array], float]

AVERAGES = ("micro", "macro", "weighted")
NAMED = ("accuracy", "top5", *(f"{kind}_{a}" for kind in ("precision", "recall", "f1") for a in AVERAGES))
"""Named metrics, all maximised; `top5` stands for any k."""

_TOP = re.compile(r"^top_?([1-9]\d*)$")
ECE_BINS = 15

SHUFFLES = 3
"""Orders of the outputs that a metric must tell apart; one alone may give the same value by chance."""


def accuracy(outputs: Array, targets: Array) -> float:
    """Return the share of examples whose highest score is at the target, 0 to 1."""
    return float(np.mean(_hits(outputs, targets, 1)))


def top_k(outputs: Array, targets: Array, k: int) -> float:
    """Return the share of examples whose target is among the k highest scores; ties go to lower classes.

    Raises:
        Refused: k exceeds the number of classes.
    """
    return float(np.mean(_hits(outputs, targets, k)))


def metric_name(task: Task) -> str:
    """Return the name of a task's metric for tables."""
    return task.metric if isinstance(task.metric, str) else getattr(task.metric, "__name__", "metric")


def maximized(task: Task) -> bool:
    """Tell whether larger values of a task's metric are better.

    Raises:
        Refused: an unknown name, a named metric to be minimised, or a function without a direction.
    """
    if callable(task.metric):
        if task.direction is None:
            raise Refused(
                "a metric that is a function needs a direction",
                value=metric_name(task),
                place="task.direction",
                fix='pass direction="maximize" or "minimize"',
                code=Exit.USAGE,
            )
        return task.direction == "maximize"
    if task.metric not in NAMED and _TOP.match(task.metric) is None:
        raise Refused(
            "must be known",
            value=repr(task.metric),
            place="task.metric",
            fix=f"{nearest(task.metric, NAMED)}; or pass a function with a direction",
            code=Exit.USAGE,
        )
    if task.direction == "minimize":
        raise Refused(
            "a named metric must be maximized",
            value=f"{task.metric}, minimize",
            place="task.direction",
            fix="leave direction out",
            code=Exit.USAGE,
        )
    return True


def metric_value(task: Task, outputs: Array, targets: Array) -> float:
    """Return the value of a task's metric on a whole split.

    Raises:
        Refused: outputs that are NaN or infinite or do not fit the targets, a metric that is undefined on
            these targets, that raises, or that returns anything but one finite number.
    """
    maximized(task)
    outputs = checked_outputs(outputs, targets)
    if callable(task.metric):
        return _own(task.metric, outputs, targets)
    _check_classes(outputs, targets)
    if task.metric == "accuracy":
        return accuracy(outputs, targets)
    top = _TOP.match(task.metric)
    if top is not None:
        return top_k(outputs, targets, int(top[1]))
    if len(np.unique(targets)) < 2:
        raise Refused(
            "the targets must have at least two classes",
            value=f"only class {targets[0]}",
            place=f"metric {task.metric}",
            fix="judge by accuracy, or add others",
        )
    return _sklearn(task.metric, outputs.argmax(axis=1), targets)


def per_example(task: Task, outputs: Array, targets: Array) -> NDArray[np.bool_] | None:
    """Return right or wrong for every example, `[n]`, or None where the metric is no mean of these."""
    if callable(task.metric):
        return None
    top = 1 if task.metric == "accuracy" else int(match[1]) if (match := _TOP.match(task.metric)) else 0
    return _hits(checked_outputs(outputs, targets), targets, top) if top else None


def is_classification(outputs: Array, targets: Array) -> bool:
    """Tell whether outputs are `[n, classes]` scores and targets `[n]` indices of these classes."""
    return (
        outputs.ndim == 2
        and targets.shape == outputs.shape[:1]
        and outputs.shape[1] >= 2
        and targets.dtype.kind in "iu"
        and len(targets) > 0
        and int(targets.min()) >= 0
        and int(targets.max()) < outputs.shape[1]
    )


def per_class_recall(
    outputs: Array, targets: Array, class_names: tuple[str, ...] = ()
) -> dict[str, float | None]:
    """Return the recall of every class, by name or index; None for a class without examples."""
    if not is_classification(outputs, targets):
        return {}
    right, classes = _hits(outputs, targets, 1), outputs.shape[1]
    count = np.bincount(targets, minlength=classes)
    hits = np.bincount(targets, weights=right, minlength=classes)
    return {label_of(k, class_names): float(hits[k] / count[k]) if count[k] else None for k in range(classes)}


def label_of(index: int, class_names: tuple[str, ...]) -> str:
    """Return the name of a class, or its index where it has none."""
    return class_names[index] if index < len(class_names) else str(index)


def all_metrics(outputs: Array, targets: Array) -> dict[str, float | None]:
    """Return every metric that the report shows; None where one is undefined; empty for other outputs.

    Raises:
        Refused: outputs that are NaN or infinite or do not fit the targets.
    """
    outputs = checked_outputs(outputs, targets)
    if not is_classification(outputs, targets):
        return {}
    values: dict[str, float | None] = {"accuracy": accuracy(outputs, targets)}
    if outputs.shape[1] > 5:
        values["top5"] = top_k(outputs, targets, 5)
    one_class = len(np.unique(targets)) < 2
    predictions = outputs.argmax(axis=1)
    weights = np.ones((1, len(targets)))
    for kind in ("precision", "recall", "f1"):
        for average in ("macro", "weighted"):
            name = f"{kind}_{average}"
            value = float(weighted_scores(name, predictions, targets, weights)[0])
            values[name] = None if one_class else value
    values["calibration_error"] = calibration_error(outputs, targets)
    return values


def weighted_scores(name: str, predictions: Array, targets: Array, weights: Array) -> NDArray[np.float64]:
    """Return precision, recall or F1 under each row of example weights: the fast twin of scikit-learn's.

    Args:
        name: `precision_macro`, `f1_micro`, ...
        predictions, targets: `[n]` class indices.
        weights: `[rows, n]`, for example how often a bootstrap sample drew each example.
    """
    kind, average = name.split("_")
    classes, right = int(max(predictions.max(), targets.max())) + 1, predictions == targets

    def count(labels: Array, examples: Array) -> NDArray[np.float64]:
        place = labels + classes * np.arange(len(weights))[:, None]
        counts = np.bincount(place.ravel(), weights[:, examples].ravel(), classes * len(weights))
        return counts.reshape(len(weights), classes).astype(np.float64)

    everything = np.ones(len(targets), bool)
    hit = count(targets[right], right)
    support, predicted = count(targets, everything), count(predictions, everything)
    below = {"precision": predicted, "recall": support, "f1": (support + predicted) / 2}[kind]
    if average == "micro":
        return np.asarray(hit.sum(axis=1) / below.sum(axis=1))
    score = np.divide(hit, below, out=np.zeros_like(hit), where=below > 0)
    share = support if average == "weighted" else (support + predicted > 0).astype(float)
    return np.asarray((score * share).sum(axis=1) / share.sum(axis=1))


def calibration_error(outputs: Array, targets: Array, bins: int = ECE_BINS) -> float:
    """Return the expected calibration error, 0 to 1: mean gap of confidence and accuracy, equal-width bins.

    Rows that are no probabilities go through the softmax.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    scores = np.asarray(outputs, float)
    if (scores < 0).any() or not np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    confidence, right = scores.max(axis=1), _hits(outputs, targets, 1)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, confidence - right, bins)
    return float(np.abs(gap).sum() / len(targets))


def reacts(task: Task, outputs: Array, targets: Array) -> str:
    """Return a note where the metric stays the same when outputs are given to other examples, else ''."""
    rng, own = np.random.default_rng(0), metric_value(task, outputs, targets)
    shuffled = [outputs[rng.permutation(len(outputs))] for _ in range(SHUFFLES)]
    if all(np.array_equal(other, outputs) for other in shuffled):
        return "the model's output is the same for all examples"
    if all(metric_value(task, other, targets) == own for other in shuffled):
        return f"metric {metric_name(task)} does not react: shuffled outputs give the same value"
    return ""


def checked_outputs(outputs: Array, targets: Array) -> Array:
    """Return outputs as an array; refuse NaN, infinities and another number of examples than targets.

    NaN must never reach an argmax, which would return a class for it.
    """
    outputs = np.asarray(outputs)
    if outputs.ndim == 0 or len(outputs) != len(targets) or len(targets) == 0:
        raise Refused(
            "must be one for each of at least 1 target",
            value=f"{outputs.shape} for {len(targets)}",
            place="outputs",
            fix="give the outputs of all examples of the split, in its order",
        )
    if outputs.dtype.kind in "fc":
        bad = ~np.asarray(np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1))
        if bad.any():
            raise Refused(
                "the outputs must be finite",
                value=f"NaN or infinity in {_share(bad)}",
                place=f"outputs, first at example {int(bad.argmax())}",
                fix="look for overflow or a division by zero in the model",
            )
    return outputs


def _share(bad: NDArray[np.bool_]) -> str:
    return f"{int(bad.sum())} of {bad.size} examples"


def _check_classes(outputs: Array, targets: Array) -> None:
    if not is_classification(outputs, targets):
        span = f"{targets.min()}..{targets.max()}" if targets.dtype.kind in "iuf" else "no numbers"
        raise Refused(
            "outputs must be [n, classes] and targets [n] indices of these classes",
            value=f"outputs {outputs.shape}, targets {targets.shape} {targets.dtype} in {span}",
            place="metric",
            fix="give class indices, or pass a function as metric with its direction",
        )


def _hits(outputs: Array, targets: Array, k: int) -> NDArray[np.bool_]:
    _check_classes(outputs, targets)
    if k > outputs.shape[1]:
        raise Refused(
            "k must be at most the number of classes",
            value=f"top{k} of {outputs.shape[1]} classes",
            place="task.metric",
            fix="choose a smaller k",
        )
    if k == 1:
        return np.asarray(outputs.argmax(axis=1) == targets)
    order = np.argsort(-outputs.astype(float), axis=1, kind="stable")[:, :k]
    return np.asarray((order == targets[:, None]).any(axis=1))


def _sklearn(name: str, predictions: Array, targets: Array) -> float:
    try:
        from sklearn import metrics
    except ImportError:
        raise Refused(
            "needs scikit-learn",
            place=f"metric {name}",
            fix='run `pip install "penjing[metrics]"`',
            code=Exit.ENVIRONMENT,
        ) from None
    kind, average = name.split("_")
    score = getattr(metrics, f"{kind}_score")
    return float(score(targets, predictions, average=average, zero_division=0))


def _own(metric: Metric, outputs: Array, targets: Array) -> float:
    name = getattr(metric, "__name__", "metric")
    try:
        value: Any = metric(outputs.copy(), targets.copy())  # it may write to what it gets
        if hasattr(value, "detach"):
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
    except Exception as error:  # the user's code may raise anything; its message is the reason
        raise Refused(
            "must return a number",
            value=f"{type(error).__name__}: {error}",
            place=f"metric {name}",
            fix="it receives NumPy arrays",
        ) from error
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise Refused(
            "must return one number",
            value=f"{type(value).__name__} {str(value)[:60]}",
            place=f"metric {name}",
            fix="return a Python float",
        )
    number = float(array.reshape(()))
    if not np.isfinite(number):
        raise Refused(
            "must return a finite number",
            value=number,
            place=f"metric {name}",
            fix="check the metric on the baseline's outputs",
        )
    return number
