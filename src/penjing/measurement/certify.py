"""The certificate of quality: candidates compared with the baseline, example by example, in a fixed order.

Each candidate is tested for "the true drop is max_drop or more" at the full level; testing stops at the
first that is not certified, so that trying several costs no validity (fixed-sequence testing: Maurer,
Hothorn and Lehmacher, 1995; for compression: Laufer-Goldshtein et al., "Efficiently Controlling Multiple
Risks with Pareto Testing", ICLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.statistics import drop_bounds, holm, superiority_p_value
from penjing.core.errors import Refused
from penjing.core.measurement import Estimate
from penjing.core.task import Task
from penjing.core.verdict import Certificate, Flips, Step, WorstClass
from penjing.measurement.compare import compare, numbered
from penjing.measurement.paired import Paired
from penjing.measurement.quality import is_classification, label_of, metric_name

Array = NDArray[Any]


def certify(
    baseline_outputs: Array,
    candidates: Sequence[tuple[str, Array]],
    targets: Array,
    task: Task,
    max_drop: float | None,
    confidence: float = 0.95,
    groups: Array | None = None,
) -> tuple[Certificate, int | None]:
    """Test candidates in the order given, safest first, and return the certificate of the last certified.

    Args:
        baseline_outputs: of the unseen split, for each example.
        candidates: name and outputs of each, on the same examples in the same order.
        targets: of these examples.
        task: its metric, direction, range of the metric and class names.
        max_drop: largest loss of the metric, absolute; None: intervals only, nothing is tested.
        confidence: one-sided, between 0.5 and 1; at most 1 - confidence of such runs certify any
            candidate whose true drop is `max_drop` or more.
        groups: `[n]`, equal for examples that depend on each other (of a patient, a user, a document): then
            whole groups are what is counted as independent; None where all examples are.

    Returns:
        The certificate, and the index of the last certified candidate. Where none is: None, and the
        certificate describes the first candidate (without a limit, the last).

    Raises:
        Refused: no candidate, or outputs or a metric that `metric_value` refuses.

    >>> targets = np.arange(2000) % 4
    >>> outputs = np.eye(4)[targets]
    >>> worse = np.where(np.arange(2000)[:, None] < 3, np.roll(outputs, 1, axis=1), outputs)
    >>> certificate, index = certify(outputs, [("small", worse)], targets, Task(None), max_drop=0.01)
    >>> index, certificate.drop.value, certificate.judge(0.01).status
    (0, 0.0015, 'reached')
    """
    if not candidates:
        raise Refused(
            "needs at least one candidate",
            place="certify",
            fix="give (name, outputs) of the baseline itself where nothing else is tested",
        )
    pairs = [compare(task, baseline_outputs, outputs, targets, groups) for _, outputs in candidates]
    steps = _walk([name for name, _ in candidates], pairs, max_drop, confidence)
    certified = max((i for i, step in enumerate(steps) if step.certified), default=None)
    position = certified if certified is not None else (len(steps) - 1 if max_drop is None else 0)
    pair, step = pairs[position], steps[position]
    bounds = pair.bounds(confidence)
    drop = Estimate(
        value=bounds.value,
        low=bounds.low,
        high=step.upper,
        confidence=confidence,
        n=len(targets),
        how=f"{pair.method}; both bounds one-sided",
    )
    flips, worst = _changes(baseline_outputs, candidates[position][1], targets, confidence, task.class_names)
    smallest, units = pair.smallest(confidence), numbered(groups)
    certificate = Certificate(
        candidate=step.name,
        position=position,
        metric=metric_name(task),
        max_drop=max_drop,
        n=len(targets),
        groups=None if units is None else int(units.max()) + 1,
        confidence=confidence,
        method=pair.method,
        drop=drop,
        flips=flips,
        worst_class=worst if units is None else None,
        no_bound=pair.no_bound,
        smallest_certifiable_drop=smallest if math.isfinite(smallest) else None,
        needed_n=None if max_drop is None else pair.needed(max_drop, confidence),
        sequence=tuple(steps),
    )
    return certificate, certified


def _walk(
    names: Sequence[str], pairs: Sequence[Paired], max_drop: float | None, confidence: float
) -> list[Step]:
    steps: list[Step] = []
    stopped_at = ""
    for name, pair in zip(names, pairs, strict=True):
        drop, _, upper = pair.bounds(confidence)
        if max_drop is None or stopped_at:
            reason = f"not tested: the sequence stopped at {stopped_at}" if stopped_at else "no limit to test"
            steps.append(
                Step(name=name, drop=drop, upper=upper, p_value=None, certified=False, reason=reason)
            )
            continue
        p = pair.p_value(max_drop, 1 - confidence)
        certified = p <= 1 - confidence and upper <= max_drop
        reason = "" if certified else f"the drop may exceed {max_drop:g}: upper bound {upper:.4g}"
        reason = f"no bound on the metric: {pair.no_bound}" if pair.no_bound else reason
        steps.append(
            Step(
                name=name,
                drop=drop,
                upper=upper if certified or pair.no_bound else max(upper, max_drop),
                p_value=p,
                certified=certified,
                reason=reason,
            )
        )
        stopped_at = "" if certified else name
    return steps


def _changes(
    baseline: Array, candidate: Array, targets: Array, confidence: float, classes: tuple[str, ...]
) -> tuple[Flips | None, WorstClass | None]:
    if not (is_classification(baseline, targets) and is_classification(candidate, targets)):
        return None, None
    old, new = baseline.argmax(axis=1), candidate.argmax(axis=1)
    lost, gained = (old == targets) & (new != targets), (old != targets) & (new == targets)
    flips = Flips(
        total=int((old != new).sum()), correct_to_wrong=int(lost.sum()), wrong_to_correct=int(gained.sum())
    )
    return flips, _worst_class(lost, gained, targets, confidence, classes)


def _worst_class(
    lost: Array, gained: Array, targets: Array, confidence: float, classes: tuple[str, ...]
) -> WorstClass:
    labels, index, counts = np.unique(targets, return_inverse=True, return_counts=True)
    losses, gains = np.bincount(index, lost).astype(int), np.bincount(index, gained).astype(int)
    drops = (losses - gains) / counts
    p = [superiority_p_value(int(b), int(c)) for b, c in zip(losses, gains, strict=True)]
    k = int(np.lexsort((p, -drops))[0])
    joint = 1 - (1 - confidence) / len(labels)
    bounds = drop_bounds(int(losses[k]), int(gains[k]), int(counts[k]), joint)
    return WorstClass(
        label=label_of(int(labels[k]), classes),
        drop=bounds.value,
        low=bounds.low,
        high=bounds.high,
        n=int(counts[k]),
        p_holm=float(holm(p)[k]),
    )
