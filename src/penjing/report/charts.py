"""The numbers behind the charts, as plain JSON that the page hands to Chart.js."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured
from penjing.core.verdict import is_share
from penjing.report.record import Record, StepRow
from penjing.report.words import clean, median_ms, metric_of

PointOf = Callable[[StepRow], list[float] | None]
"""Value, low and high of a step in a chart; None where there is no number."""

MAX_POINTS = 500
"""Trials drawn in the Pareto chart; the page says so where there are more."""
MAX_CLASSES = 40
"""Classes drawn in the chart by class: those that changed most."""


def build_charts(record: Record) -> dict[str, Any]:
    """Return the data of every chart that the record has numbers for, by the id of its canvas.

    Keys: `pareto`, `ablation-latency`, `ablation-quality`, `distribution`, `classes`. A chart without
    numbers is absent, so that no empty axes are drawn.
    """
    result, base, ablation = record.result, record.baselines.target, record.ablation
    metric = metric_of(record)
    charts = {
        "pareto": _pareto(record, base, result, metric),
        "ablation-latency": _steps(ablation, _latency_point, "latency p50, ms"),
        "ablation-quality": _steps(ablation, lambda s: _quality_point(s, metric), axis_title(metric)),
        "distribution": _distribution(record),
        "classes": _classes(base, result),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def dump_script_json(data: Any) -> Markup:
    """Return JSON that is safe inside a script element: no `<`, `>`, `&` or line separator survives.

    >>> dump_script_json({"name": "</script>"})
    Markup('{"name":"\\\\u003c/script\\\\u003e"}')
    """
    text = json.dumps(_plain(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def axis_title(metric: str) -> str:
    """Return the title of a quality axis."""
    return f"{clean(metric, 40)}, %" if is_share(metric) else clean(metric, 40)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scale(metric: str) -> float:
    return 100.0 if is_share(metric) else 1.0


def _point(m: Measurement | None, name: str) -> dict[str, Any] | None:
    """One point of latency against quality, with both intervals; None where either is missing."""
    if m is None or not isinstance(m.quality, Estimate) or not isinstance(m.latency, Latency):
        return None
    scale, q, p50 = _scale(m.metric), m.quality, m.latency.p50_ms
    return {
        "name": name,
        "x": p50.value,
        "y": q.value * scale,
        "xlow": p50.low,
        "xhigh": p50.high,
        "ylow": q.low * scale,
        "yhigh": q.high * scale,
        "size": m.size_bytes,
        "split": m.split,
    }


def _pareto(record: Record, base: Measurement, result: Measurement, metric: str) -> dict[str, Any] | None:
    points: dict[str, list[dict[str, Any]]] = {"feasible": [], "infeasible": [], "front": []}
    for trial in record.trials[:MAX_POINTS]:
        point = _point(trial.measurement, trial.name)
        if point is None:
            continue
        points["feasible" if trial.feasible else "infeasible"].append(point)
        if trial.pareto:
            points["front"].append(point)
    points["front"].sort(key=lambda p: p["x"])
    for name, m in (("baseline", base), ("result", result)):
        point = _point(m, m.name)
        points[name] = [] if point is None else [point]
    if not any(points.values()):
        return None
    return {"points": points, "metric": axis_title(metric)}


def _steps(steps: Sequence[StepRow], point: PointOf, axis: str) -> dict[str, Any] | None:
    found = [(step.step, point(step)) for step in steps]
    if not any(p is not None for _, p in found):
        return None
    return {"labels": [name for name, _ in found], "points": [p for _, p in found], "axis": axis}


def _latency_point(step: StepRow) -> list[float] | None:
    value, low, high = step.latency_ms, step.low, step.high
    if value is None:
        return None
    return [value, value if low is None else low, value if high is None else high]


def _quality_point(step: StepRow, metric: str) -> list[float] | None:
    q = step.quality
    if isinstance(q, NotMeasured):
        return None
    return [value * _scale(metric) for value in (q.value, q.low, q.high)]


def _distribution(record: Record) -> list[dict[str, Any]] | None:
    lines = []
    for role, name, m in (
        ("eager", "float", record.baselines.eager),
        ("baseline", "float", record.baselines.target),
        ("result", "result", record.result),
    ):
        if m is not None and isinstance(m.latency, Latency) and m.latency.quantiles_ms:
            lines.append({"role": role, "name": f"{name} in {m.target}", "ms": m.latency.quantiles_ms})
    return lines or None


def _classes(base: Measurement, result: Measurement) -> dict[str, Any] | None:
    rows = list_class_recalls(base, result)[:MAX_CLASSES]
    if not rows:
        return None
    return {
        "labels": [name for name, _, _ in rows],
        "before": [None if b is None else b * 100 for _, b, _ in rows],
        "after": [None if a is None else a * 100 for _, _, a in rows],
    }


def list_class_recalls(
    base: Measurement, result: Measurement
) -> list[tuple[str, float | None, float | None]]:
    """Return (class, recall before, recall after), what lost most first where there are many classes."""
    before, after = base.per_class, result.per_class
    rows = [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]
    if len(rows) > MAX_CLASSES:
        rows.sort(key=lambda row: math.inf if row[1] is None or row[2] is None else row[2] - row[1])
    return rows


def compare_eager_latency(record: Record) -> float | None:
    """Return the median latency of the eager model over that of the target's float baseline."""
    eager, target = median_ms(record.baselines.eager), median_ms(record.baselines.target)
    return None if not eager or not target else eager / target
