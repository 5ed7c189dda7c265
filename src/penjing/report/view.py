"""What the HTML page shows, computed from a record: only cleaned strings and rows of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.core.errors import Exit, Refused
from penjing.core.measurement import Measurement, NotMeasured
from penjing.report import words
from penjing.report.certificate import certificate
from penjing.report.charts import class_rows, latency_gap
from penjing.report.recipes import probed_recipes, recipe_rows
from penjing.report.sparsity import zeros_sentence
from penjing.report.words import RECALL, Json, amount, clean, number, quality

SCHEMA = 1
"""Newest schema of a record that this version reads."""


@dataclass(frozen=True)
class Cell:
    """A value of a table and a smaller second line: its interval, or why it is missing."""

    text: str
    note: str = ""


def check(record: Any) -> None:
    """Refuse what is not the record of a run that this version can read."""
    if not isinstance(record, dict) or "verdict" not in record:
        raise Refused(
            "the record has a verdict",
            value=type(record).__name__,
            place="report",
            fix="pass the record.json of a finished run",
        )
    schema = record.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise Refused(
            f"the record's schema is at most {SCHEMA}",
            value=schema,
            place="report",
            fix="read it with the version of Penjing that wrote it, or a newer one",
            code=Exit.ENVIRONMENT,
        )


def view(record: Json, rows: int, folder: Path | None = None) -> dict[str, Any]:
    """Return everything that the template shows.

    Args:
        record: the run's record.
        rows: largest number of rows of the tables that grow with model and search.
        folder: the run directory, for the lines that load the artefact.

    Raises:
        Refused: not a record, or of a newer schema.
    """
    check(record)
    shown = words.measurements(record)
    base = next((m for role, m in shown if role == "float model in the target"), None)
    result = next((m for role, m in shown if role == "result"), None)
    metric = words.metric_of(record)
    verdict = record["verdict"]
    return {
        "name": record.get("name") or "run",
        "version": record.get("penjing", ""),
        "created": record.get("created", ""),
        "metric": metric,
        "status": verdict["status"],
        "headline": headline(record),
        "summary": summary(result, base, verdict, metric),
        "limits": _limits(verdict, metric),
        "verdict_notes": list(verdict.get("notes") or ()),
        "notes": list(record.get("notes") or ()),
        "measured": [_measured_row(role, m) for role, m in shown],
        "runtime_note": _runtime_note(record),
        "recipe_note": probed_recipes(record),
        "recipes": recipe_rows(record),
        "zeros": zeros_sentence(record),
        "difference": None if result is None or result.difference is None else number(result.difference),
        "metrics": _metric_rows(shown),
        "ablation": [_step_row(step, metric) for step in record.get("ablation") or ()],
        "plan": words.plan_words(record.get("plan")),
        "classes": _class_rows(base, result, rows),
        "changes": _change_rows(record, rows),
        "change_counts": _change_counts(record),
        "trials": _trial_rows(record, rows),
        "failures": words.failures(record),
        "totals": {key: len(record.get(key) or ()) for key in ("changes", "trials")},
        "certificate": certificate(verdict.get("certificate"), metric),
        "environment": list(words.flat(record.get("environment") or {})),
        "forecast": list(words.flat(record.get("forecast") or {})),
        "config": list(words.flat(record.get("config") or {})),
        "spent": _spent(record),
        "artefact": _artefact(record),
        "load": words.how_to_load(record, folder),
    }


def headline(record: Json) -> str:
    """Return the verdict in one line."""
    verdict = record["verdict"]
    limits = (verdict.get("limits") or {}).values()
    total = len(limits)
    count = {s: sum(1 for x in limits if x.get("status") == s) for s in words.STATUS_WORDS}
    if record.get("result") is None:
        return "No candidate could be delivered; the baseline stands"
    if not total:
        return "No limits were set; measured, not judged"
    if verdict["status"] == "reached":
        return "The limit is reached" if total == 1 else f"All {total} limits are reached"
    if verdict["status"] == "not_reached":
        return f"{count['not_reached']} of {total} limits not reached; this is the best that was found"
    return f"{count['inconclusive']} of {total} limits inconclusive: the measurements do not decide"


def summary(result: Measurement | None, base: Measurement | None, verdict: Json, metric: str) -> str:
    """Say in one sentence what became of the model."""
    if result is None or base is None:
        return "There is no result to compare with the baseline; see the trials below for the reasons."
    parts = []
    speed, interval = words.speedup_of(result)
    if interval and speed not in ("—", words.NOT_MEASURED):
        slower = "slower, only " if "slower" in speed else ""
        parts.append(f"{slower}{speed.split('×')[0]} times as fast ({interval.replace('×', '')})")
    if result.size_bytes and base.size_bytes:
        times = base.size_bytes / result.size_bytes
        parts.append(f"{times:.2f} times smaller" if times >= 1 else f"{1 / times:.2f} times larger")
    said = [f"is {', '.join(parts)}"] if parts else []
    found = (verdict.get("certificate") or {}).get("drop") or {}
    if found.get("value") is not None:
        verb = "loses" if found["value"] >= 0 else "gains"
        said.append(f"{verb} {words.drop(abs(found['value']), metric)} of {clean(metric, 60)}")
    became = " and ".join(said) or "was measured"
    return f"Against the float model in {clean(base.target, 60)}, the result {became}."


def _limits(verdict: Json, metric: str) -> list[dict[str, str]]:
    return [
        {
            "title": words.title_of(name),
            "status": limit["status"],
            "word": words.STATUS_WORDS.get(limit["status"], "inconclusive"),
            "mark": words.STATUS_MARKS.get(limit["status"], "?"),
            "sentence": words.limit_sentence(name, limit, metric),
            "reason": limit.get("reason") or "",
        }
        for name, limit in (verdict.get("limits") or {}).items()
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


def _runtime_note(record: Json) -> str:
    gap = latency_gap(record)
    chosen = words.chosen_runtime(record)
    if gap is None:
        return chosen
    how = f"{gap:.1f} times faster" if gap >= 1 else f"{1 / gap:.1f} times slower"
    if chosen:
        base = clean(record["baselines"]["target"]["target"], 60)
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
    return {"columns": [Cell(role, m.name) for role, m in shown], "rows": rows if shown else []}


def _throughput(m: Measurement) -> str:
    if isinstance(m.latency, NotMeasured):
        return words.NOT_MEASURED
    return f"{number(m.latency.throughput_per_s.value)}/s at batch {m.latency.batch}"


def _parameters(m: Measurement) -> str:
    return words.NOT_MEASURED if m.operations is None else amount(m.operations.parameters, "count")


def _step_row(step: Json, metric: str) -> tuple[str, Cell, Cell, str, str]:
    q = step.get("quality") or {"kind": "not_measured", "reason": ""}
    if q.get("kind") == "estimate":
        interval = words.between(quality(q["low"], metric), quality(q["high"], metric))
        judged = Cell(quality(q["value"], metric), interval)
    else:
        judged = Cell(words.NOT_MEASURED, q.get("reason") or "")
    latency = Cell(words.NOT_MEASURED)
    if step.get("latency_ms") is not None:
        low, high = step.get("low"), step.get("high")
        between = "" if low is None or high is None else words.between(amount(low, "ms"), amount(high, "ms"))
        latency = Cell(amount(step["latency_ms"], "ms"), between)
    size, operations = step.get("size_bytes"), step.get("operations")
    return (
        str(step.get("step", "")),
        judged,
        latency,
        words.NOT_MEASURED if size is None else amount(size, "bytes"),
        words.NOT_MEASURED if not operations else amount(operations["multiply_adds"], "count"),
    )


def _class_rows(
    base: Measurement | None, result: Measurement | None, rows: int
) -> list[tuple[str, str, str, str]]:
    return [
        (
            name,
            quality(before, RECALL),
            quality(after, RECALL),
            "—" if before is None or after is None else words.drop(after - before, RECALL, signed=True),
        )
        for name, before, after in class_rows(base, result)[:rows]
    ]


def _change_rows(record: Json, rows: int) -> list[tuple[str, str, str, str]]:
    return [
        (
            change["method"],
            change["layer"],
            change["status"],
            "; ".join(filter(None, (change.get("reason"), _details(change.get("detail") or {})))),
        )
        for change in list(record.get("changes") or ())[:rows]
    ]


def _details(detail: Json) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {number(value) if isinstance(value, int | float) else value}"
        for key, value in detail.items()
    )


def _change_counts(record: Json) -> list[tuple[str, int, int]]:
    counts: dict[str, list[int]] = {}
    for change in record.get("changes") or ():
        counts.setdefault(change["method"], [0, 0])[change["status"] != "done"] += 1
    return [(method, done, skipped) for method, (done, skipped) in counts.items()]


def _trial_rows(record: Json, rows: int) -> list[dict[str, Any]]:
    found = []
    for trial in list(record.get("trials") or ())[:rows]:
        m = None if trial.get("measurement") is None else Measurement.model_validate(trial["measurement"])
        state = "keeps every limit" if trial.get("feasible") else _broken(trial)
        failed = trial.get("status") == "failed"
        found.append(
            {
                "name": str(trial.get("name", "")),
                "state": "failed" if failed else state + (", on the front" if trial.get("pareto") else ""),
                "reason": trial.get("reason") or "",
                "quality": Cell(*words.quality_of(m)) if m else Cell("—"),
                "latency": Cell(*words.latency_of(m, "p50_ms")) if m else Cell("—"),
                "size": words.size_of(m) if m else "—",
                "seconds": amount(words.seconds_of(trial), "s"),
            }
        )
    return found


def _broken(trial: Json) -> str:
    names = [words.title_of(name).lower() for name in trial.get("breaks") or ()]
    return f"breaks {', '.join(names)}" if names else "breaks a limit"


def _spent(record: Json) -> dict[str, Any]:
    spent = record.get("spent") or {}
    by, total = spent.get("by") or {}, spent.get("seconds") or 0.0
    rows = [
        (name, amount(seconds, "s"), round(100 * seconds / total, 1) if total else 0.0)
        for name, seconds in sorted(by.items(), key=lambda item: -item[1])
    ]
    return {"total": amount(total, "s"), "trials": spent.get("trials"), "rows": rows}


def _artefact(record: Json) -> dict[str, Any] | None:
    artefact = record.get("artefact")
    if not artefact:
        return None
    files = [(f["name"], amount(f["bytes"], "bytes"), f["sha256"]) for f in artefact.get("files") or ()]
    return {"path": artefact.get("path", ""), "sha256": artefact.get("sha256", ""), "files": files}
