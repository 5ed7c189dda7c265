"""The report of a search for a training strategy: one HTML file that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penjing.core.files import write_text
from penjing.report.charts import dump_script_json
from penjing.report.html import load_page_assets, load_template
from penjing.report.words import Json

MAX_CURVES = 12
"""Curves drawn: the best run's, then those of the runs that trained longest."""


def render_training(record: Json) -> str:
    """Return the report of a search's record (plain JSON) as one HTML document.

    It makes no request, and its numbers are in its tables too.
    """
    share = not record["metric"].startswith("loss") and 0 <= record["quality"] <= 1
    runs = [_row(i, run, share) for i, run in enumerate(record["runs"])]
    return load_template("training.html.j2").render(
        goal=_goal(record["goal"], share),
        reached=record["reached"],
        seconds=f"{record['seconds']:.1f} s",
        spent=f"{record['spent_s']:.0f} s",
        quality=_value(record["quality"], share),
        test_quality=_value(record["test_quality"], share),
        metric=record["metric"],
        strategy=_strategy(record["strategy"]),
        best=record["best"] + 1,
        runs=runs,
        events=record["events"],
        probe=[(name, f"{1e3 * seconds:.3g} ms") for name, seconds in record["probe"].items()],
        charts=dump_script_json(_charts(record, share)),
        **load_page_assets("training.js"),
    )


def write_training_report(record: Json, path: Path) -> Path:
    """Render a record and write it atomically; returns the path.

    Raises:
        Refused: the file cannot be written.
    """
    write_text(path, render_training(record))
    return path


def _charts(record: Json, share: bool) -> dict[str, Any]:
    runs = [(i, run) for i, run in enumerate(record["runs"]) if run["record"] is not None]
    runs.sort(key=lambda pair: (pair[0] != record["best"], -pair[1]["seconds"]))
    scale = 100.0 if share else 1.0
    curves = [
        {
            "label": f"run {i + 1}",
            "best": i == record["best"],
            "points": [[point["seconds"], scale * point["quality"]] for point in run["record"]["curve"]],
        }
        for i, run in runs[:MAX_CURVES]
    ]
    ranges = [
        {"label": name, "points": list(map(list, zip(each["rates"], each["losses"], strict=True)))}
        for name, each in record["ranges"].items()
        if each["rates"]
    ]
    title = f"{record['metric']}, %" if share else record["metric"]
    return {
        "curves": {"sets": curves, "y": title, "goal": scale * record["goal"]["value"]},
        "ranges": {"sets": ranges, "y": "training loss, smoothed"},
    }


def _row(index: int, run: Json, share: bool) -> dict[str, str]:
    record = run["record"]
    reached = "" if record is None or record["reached"] is None else f"{record['reached']['seconds']:.1f} s"
    return {
        "number": str(index + 1),
        "round": str(run["round"]),
        "time": f"{run['seconds']:.3g} s",
        "strategy": _strategy(run["strategy"]),
        "quality": run["refused"] if record is None else _value(record["quality"], share),
        "reached": reached,
        "speed": "" if record is None else f"{record['samples_per_s']:.0f}",
    }


SAID = (
    "optimizer",
    "lr",
    "schedule",
    "batch_size",
    "weight_decay",
    "averaging",
    "label_smoothing",
    "precision",
)


def _strategy(fields: Json) -> str:
    return ", ".join(f"{name} {fields[name]}" for name in SAID if fields[name] not in (None, "none", 0.0))


def _value(value: float, share: bool) -> str:
    return f"{100 * value:.2f}%" if share else f"{value:.4g}"


def _goal(goal: Json, share: bool) -> str:
    sign = "at least" if goal["at_least"] else "at most"
    return f"{goal['metric']} {sign} {_value(goal['value'], share)}"


def write_range_report(optimizer: str, found: Json, path: Path) -> Path:
    """Write the page of a range test atomically; returns the path.

    Args:
        optimizer: its name.
        found: `rates`, `losses`, `suggestion` and `highest`.
        path: of the page.

    Raises:
        Refused: the file cannot be written.
    """
    points = [list(pair) for pair in zip(found["rates"], found["losses"], strict=True)]
    chart = {"sets": [{"label": optimizer, "points": points}], "y": "training loss, smoothed"}
    page = load_template("range.html.j2").render(
        optimizer=optimizer,
        suggestion=f"{found['suggestion']:.3g}",
        highest=f"{found['highest']:.3g}",
        steps=len(points),
        rows=[(f"{rate:.3g}", f"{loss:.4g}") for rate, loss in points],
        charts=dump_script_json({"ranges": chart}),
        **load_page_assets("training.js"),
    )
    write_text(path, page)
    return path
