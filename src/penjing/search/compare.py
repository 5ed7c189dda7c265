"""Compare what two finished runs delivered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penjing.core.budget import say
from penjing.core.measurement import Estimate, Measurement
from penjing.core.trial import get_cost
from penjing.search.result import Result, open_result

_COSTS = (("latency", "ms"), ("size", "bytes"), ("memory", "bytes"), ("operations", "count"))


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Return rows of quality and costs with their ratio, and notes on what cannot be compared.

    Latencies of two runs were not interleaved: where the ratios to each run's own float model differ, that
    ratio is the fairer figure, so both are given.

    Raises:
        Refused: a folder is no finished run.
    """
    results = [open_result(first), open_result(second)]
    a, b = (result.typed.result for result in results)
    rows = [_quality(a, b), *(_cost(name, unit, a, b) for name, unit in _COSTS), _ratio(a, b)]
    rows.append(
        {
            "name": "verdict",
            "first": results[0].verdict.status,
            "second": results[1].verdict.status,
            "words": "",
        }
    )
    return {"first": str(first), "second": str(second), "rows": rows, "notes": _notes(a, b, results)}


def _quality(a: Measurement, b: Measurement) -> dict[str, Any]:
    words = ""
    if isinstance(a.quality, Estimate) and isinstance(b.quality, Estimate) and a.metric == b.metric:
        words = f"{b.quality.value - a.quality.value:+.4f}"
    return {"name": a.metric, "first": _interval(a), "second": _interval(b), "words": words}


def _interval(m: Measurement) -> str:
    q = m.quality
    return f"{q.value:.4f} [{q.low:.4f}, {q.high:.4f}]" if isinstance(q, Estimate) else "not measured"


def _cost(name: str, unit: str, a: Measurement, b: Measurement) -> dict[str, Any]:
    first, second = get_cost(a, name), get_cost(b, name)
    words = f"{second / first:.2f}×" if first and second else ""
    return {"name": name, "first": _say(first, unit), "second": _say(second, unit), "words": words}


def _ratio(a: Measurement, b: Measurement) -> dict[str, Any]:
    values = [getattr(getattr(m.latency, "ratio", None), "value", None) for m in (a, b)]
    first, second = (("not measured" if v is None else f"{v:.3f}") for v in values)
    return {"name": "latency / own float model", "first": first, "second": second, "words": ""}


def _say(value: float | None, unit: str) -> str:
    return "not measured" if value is None else say(value, unit)


def _notes(a: Measurement, b: Measurement, results: list[Result]) -> list[str]:
    notes = ["latencies were measured in two runs, not interleaved: trust ratios to the own float model more"]
    if a.metric != b.metric:
        notes.append(f"different metrics: {a.metric} and {b.metric}")
    if a.target != b.target:
        notes.append(f"different targets: {a.target} and {b.target}")
    machines = [result.typed.environment.get("processor") for result in results]
    if machines[0] != machines[1]:
        notes.append(f"different machines: {machines[0]} and {machines[1]}")
    return notes
