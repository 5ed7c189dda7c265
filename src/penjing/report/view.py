"""What the HTML page shows, computed from a record: only cleaned strings and rows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.core.measurement import Measurement, NotMeasured
from penjing.core.value import Value
from penjing.core.verdict import Verdict
from penjing.report import words
from penjing.report.certificate import describe_certificate
from penjing.report.charts import compare_eager_latency, list_class_recalls
from penjing.report.recipes import describe_recipes, list_recipe_rows
from penjing.report.record import Record, StepRow, TrialRow
from penjing.report.sparsity import describe_zeros
from penjing.report.words import RECALL, amount, clean, number, quality


@dataclass(frozen=True)
class Cell:
    """A value of a table and a smaller second line: its interval, or why it is missing."""

    text: str
    note: str = ""


def build_view(record: Record, rows: int, folder: Path | None = None) -> dict[str, Any]:
    """Return everything that the template shows.

    Args:
        record: the run's record.
        rows: largest number of rows of the tables that grow with model and search.
        folder: the run directory, for the lines that load the artefact.
    """
    shown, result, base = record.measurements(), record.result, record.baselines.target
    metric, verdict = words.metric_of(record), record.verdict
    return {
        "name": record.name or "run",
        "version": record.penjing,
        "created": record.created,
        "metric": metric,
        "status": verdict.status,
        "headline": write_headline(record),
        "summary": write_summary(result, base, verdict, metric),
        "limits": _limits(verdict, metric),
        "verdict_notes": list(verdict.notes),
        "notes": record.notes,
        "measured": [_measured_row(role, m) for role, m in shown],
        "runtime_note": _runtime_note(record),
        "recipe_note": describe_recipes(record.recipes),
        "recipes": list_recipe_rows(record.recipes),
        "zeros": describe_zeros(record),
        "difference": None if result.difference is None else number(result.difference),
        "metrics": _metric_rows(shown),
        "ablation": [_step_row(step, metric) for step in record.ablation],
        "plan": words.plan_words(record.plan),
        "classes": _class_rows(base, result, rows),
        "changes": _change_rows(record, rows),
        "change_counts": _change_counts(record),
        "trials": _trial_rows(record, rows),
        "failures": words.failures(record),
        "totals": {"changes": len(record.changes), "trials": len(record.trials)},
        "certificate": describe_certificate(verdict.certificate, metric),
        "environment": list(words.flat(record.environment)),
        "forecast": [] if record.forecast is None else _fields(record.forecast),
        "config": _fields(record.config),
        "spent": _spent(record),
        "artefact": _artefact(record),
        "load": words.how_to_load(record, folder),
    }


def write_headline(record: Record) -> str:
    """Return the verdict in one line."""
    verdict = record.verdict
    limits = verdict.limits.values()
    total = len(limits)
    count = {s: sum(1 for x in limits if x.status == s) for s in words.STATUS_WORDS}
    if not total:
        return "No limits were set; measured, not judged"
    if verdict.status == "reached":
        return "The limit is reached" if total == 1 else f"All {total} limits are reached"
    if verdict.status == "not_reached":
        return f"{count['not_reached']} of {total} limits not reached; this is the best that was found"
    return f"{count['inconclusive']} of {total} limits inconclusive: the measurements do not decide"


def write_summary(result: Measurement, base: Measurement, verdict: Verdict, metric: str) -> str:
    """Say in one sentence what became of the model."""
    parts = []
    speed, interval = words.speedup_of(result)
    if interval and speed not in ("—", words.NOT_MEASURED):
        slower = "slower, only " if "slower" in speed else ""
        parts.append(f"{slower}{speed.split('×')[0]} times as fast ({interval.replace('×', '')})")
    if result.size_bytes and base.size_bytes:
        times = base.size_bytes / result.size_bytes
        parts.append(f"{times:.2f} times smaller" if times >= 1 else f"{1 / times:.2f} times larger")
    said = [f"is {', '.join(parts)}"] if parts else []
    if verdict.certificate is not None:
        lost = verdict.certificate.drop.value
        verb = "loses" if lost >= 0 else "gains"
        said.append(f"{verb} {words.drop(abs(lost), metric)} of {clean(metric, 60)}")
    became = " and ".join(said) or "was measured"
    return f"Against the float model in {clean(base.target, 60)}, the result {became}."


def _limits(verdict: Verdict, metric: str) -> list[dict[str, str]]:
    return [
        {
            "title": words.title_of(name),
            "status": limit.status,
            "word": words.STATUS_WORDS[limit.status],
            "mark": words.STATUS_MARKS[limit.status],
            "sentence": words.limit_sentence(name, limit, metric),
            "reason": limit.reason,
        }
        for name, limit in verdict.limits.items()
    ]


def _measured_row(role: str, m: Measurement) -> dict[str, Any]:
    cells = [
        Cell(*words.quality_of(m)),
        *(Cell(*words.latency_of(m, p)) for p in ("p50_ms", "p95_ms")),
        Cell(*words.speedup_of(m)),
        Cell(words.size_of(m)),
        Cell(*words.estimate_of(m.memory_bytes, "bytes")),
        Cell(*words.operations_of(m)),
    ]
    return {
        "role": role,
        "name": m.name,
        "where": f"{m.target}, {m.split} split",
        "cells": cells,
        "result": role == "result",
    }


def _runtime_note(record: Record) -> str:
    gap = compare_eager_latency(record)
    chosen = words.chosen_runtime(record.runtimes, record.baselines.target.target)
    if gap is None:
        return chosen
    how = f"{gap:.1f} times faster" if gap >= 1 else f"{1 / gap:.1f} times slower"
    if chosen:
        base = clean(record.baselines.target.target, 60)
        return (
            f"The change of runtime alone makes the float model in {base} {how} than PyTorch eager. {chosen}"
        )
    return (
        f"The change of runtime alone makes the float model {how} than PyTorch eager; "
        "what compression adds is the result against the float model in the target."
    )


def _metric_rows(shown: list[tuple[str, Measurement]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for _, m in shown for name in m.metrics))
    rows = [
        ("latency p99", [words.latency_of(m, "p99_ms")[0] for _, m in shown]),
        ("throughput", [_throughput(m) for _, m in shown]),
        ("parameters", [_parameters(m) for _, m in shown]),
        *((name, [quality(m.metrics.get(name), name) for _, m in shown]) for name in names),
    ]
    return {"columns": [Cell(role, m.name) for role, m in shown], "rows": rows}


def _throughput(m: Measurement) -> str:
    if isinstance(m.latency, NotMeasured):
        return words.NOT_MEASURED
    return f"{number(m.latency.throughput_per_s.value)}/s at batch {m.latency.batch}"


def _parameters(m: Measurement) -> str:
    return words.NOT_MEASURED if m.operations is None else amount(m.operations.parameters, "count")


def _step_row(step: StepRow, metric: str) -> tuple[str, Cell, Cell, str, str]:
    q = step.quality
    if isinstance(q, NotMeasured):
        judged = Cell(words.NOT_MEASURED, q.reason)
    else:
        interval = words.between(quality(q.low, metric), quality(q.high, metric))
        judged = Cell(quality(q.value, metric), interval)
    latency = Cell(words.NOT_MEASURED)
    if step.latency_ms is not None:
        low, high = step.low, step.high
        between = "" if low is None or high is None else words.between(amount(low, "ms"), amount(high, "ms"))
        latency = Cell(amount(step.latency_ms, "ms"), between)
    size, operations = step.size_bytes, step.operations
    return (
        step.step,
        judged,
        latency,
        words.NOT_MEASURED if size is None else amount(size, "bytes"),
        words.NOT_MEASURED if operations is None else amount(operations.multiply_adds, "count"),
    )


def _class_rows(base: Measurement, result: Measurement, rows: int) -> list[tuple[str, str, str, str]]:
    return [
        (
            name,
            quality(before, RECALL),
            quality(after, RECALL),
            "—" if before is None or after is None else words.drop(after - before, RECALL, signed=True),
        )
        for name, before, after in list_class_recalls(base, result)[:rows]
    ]


def _change_rows(record: Record, rows: int) -> list[tuple[str, str, str, str]]:
    return [
        (
            change.method,
            change.layer,
            change.status,
            "; ".join(filter(None, (change.reason, _details(change.detail)))),
        )
        for change in record.changes[:rows]
    ]


def _details(detail: Mapping[str, float | int | str]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {number(value) if isinstance(value, int | float) else value}"
        for key, value in detail.items()
    )


def _change_counts(record: Record) -> list[tuple[str, int, int]]:
    counts: dict[str, list[int]] = {}
    for change in record.changes:
        counts.setdefault(change.method, [0, 0])[not change.done] += 1
    return [(method, done, skipped) for method, (done, skipped) in counts.items()]


def _trial_rows(record: Record, rows: int) -> list[dict[str, Any]]:
    found = []
    for trial in record.trials[:rows]:
        m = trial.measurement
        state = "keeps every limit" if trial.feasible else _broken(trial)
        failed = trial.status == "failed"
        found.append(
            {
                "name": trial.name,
                "state": "failed" if failed else state + (", on the front" if trial.pareto else ""),
                "reason": trial.reason,
                "quality": Cell(*words.quality_of(m)) if m else Cell("—"),
                "latency": Cell(*words.latency_of(m, "p50_ms")) if m else Cell("—"),
                "size": words.size_of(m) if m else "—",
                "seconds": amount(trial.seconds, "s"),
            }
        )
    return found


def _broken(trial: TrialRow) -> str:
    names = [words.title_of(name).lower() for name in trial.breaks]
    return f"breaks {', '.join(names)}" if names else "breaks a limit"


def _spent(record: Record) -> dict[str, Any]:
    by, total, trials = record.spent.by, record.spent.seconds, record.spent.trials
    rows = [
        (name, amount(seconds, "s"), round(100 * seconds / total, 1) if total else 0.0)
        for name, seconds in sorted(by.items(), key=lambda item: -item[1])
    ]
    return {"total": amount(total, "s"), "trials": trials, "rows": rows}


def _artefact(record: Record) -> dict[str, Any]:
    artefact = record.artefact
    files = [(file.name, amount(file.bytes, "bytes"), file.sha256) for file in artefact.files]
    return {"path": artefact.path, "sha256": artefact.sha256, "files": files}


def _fields(value: Value) -> list[tuple[str, str]]:
    return list(words.flat(value.model_dump(mode="json")))
