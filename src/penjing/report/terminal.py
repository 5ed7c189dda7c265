"""The table at the end of a run.

Colour needs a terminal that can do it; pipes, CI, `NO_COLOR`, dumb and narrow terminals get plain lines of
the same content.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement as Span
from rich.table import Column, Table
from rich.text import Text

from penjing.core.measurement import Measurement
from penjing.report import words
from penjing.report.progress import Progress, console, is_plain, write
from penjing.report.recipes import describe_recipes
from penjing.report.record import Record
from penjing.report.sparsity import describe_zeros
from penjing.report.view import write_headline
from penjing.report.words import clean

__all__ = ["Progress", "clean", "console", "final_table", "measurement_table", "plain_table"]

HEADERS = (
    ("model", ""),
    ("quality", ""),
    ("p50", "p95"),
    ("speed-up", ""),
    ("size", ""),
    ("memory", ""),
    ("mult-", "adds"),
)
STYLES = {"reached": "bold green", "not_reached": "bold red", "inconclusive": "bold yellow"}


def final_table(record: Record, console: Console, report: str | Path | None = None) -> None:
    """Print baselines, result and runners-up, every limit with its numbers, and how to go on.

    Args:
        record: of the run.
        console: where to print; narrow or plain consoles get `plain_table`.
        report: path of the HTML report, where one was written.
    """
    table = _table(record)
    narrow = Span.get(console, console.options.update(width=1000), table).maximum > console.width
    if is_plain(console) or narrow:
        known = console.is_terminal or "COLUMNS" in os.environ
        write(console, plain_table(record, width=console.width if known else 120, report=report))
        return
    console.print(table)
    for line in _plans(record):
        console.print(_text(line))
    metric = words.metric_of(record)
    for name, limit in record.verdict.limits.items():
        status = limit.status
        mark = f"{words.STATUS_MARKS.get(status, '?')} {_word(status)}"
        said = f"  {words.title_of(name)}: {words.limit_sentence(name, limit, metric)}"
        console.print(Text.assemble((mark, STYLES.get(status, "")), said))
        if limit.reason:
            console.print(_text(f"    {clean(limit.reason)}"))
    console.print(Text(write_headline(record), style=STYLES.get(record.verdict.status, "bold")))
    for closing in _closing(record, report):
        console.print(_text(closing), soft_wrap=True)


def plain_table(record: Record, *, width: int = 80, report: str | Path | None = None) -> str:
    """Return the final table as plain text: aligned columns where they fit, else a block for each model.

    No line is longer than `width` characters (at least 20), paths and code to copy excepted.
    """
    metric = words.metric_of(record)
    headers = [" / ".join(filter(None, h)).replace("- / ", "-") for h in _headers(metric)]
    rows = [[_joined(cell) for cell in row] for row in _rows(record)]
    lines = _wrapped(clean(record.name or "run"), width)
    lines += _aligned(headers, rows, width) or _blocks(headers, rows, width)
    for text in _plans(record):
        lines += _wrapped(text, width)
    for name, limit in record.verdict.limits.items():
        said = words.limit_sentence(name, limit, metric)
        text = f"{_word(limit.status)}: {words.title_of(name)}: {said}"
        lines += _wrapped(text + (f" ({clean(limit.reason)})" if limit.reason else ""), width)
    lines += _wrapped(write_headline(record), width)
    return "\n".join([*lines, *_closing(record, report)])


def measurement_table(measurements: Mapping[str, Measurement], on: Console, title: str) -> None:
    """Print measurements by name, in the columns of the final table.

    Args:
        measurements: all of one metric, taken in one interleaved run.
        on: where to print; narrow or plain consoles get plain text.
        title: of the table.
    """
    metric = next(iter(measurements.values())).metric
    rows = [[(clean(name, 60), ""), *_cells(m)] for name, m in measurements.items()]
    table = _grid(title, metric, rows)
    if not is_plain(on) and Span.get(on, on.options, table).minimum <= on.width:
        on.print(table)
        return
    headers = [" / ".join(filter(None, h)).replace("- / ", "-") for h in _headers(metric)]
    texts = [[_joined(cell) for cell in row] for row in rows]
    width = on.width if on.is_terminal else 120
    write(on, "\n".join([clean(title), *(_aligned(headers, texts, width) or _blocks(headers, texts, width))]))


def _table(record: Record) -> Table:
    return _grid(clean(record.name or "run"), words.metric_of(record), _rows(record))


def _grid(title: str, metric: str, rows: list[list[tuple[str, str]]]) -> Table:
    first, *others = ["\n".join(filter(None, h)) for h in _headers(metric)]
    columns = [Column(_text(first), no_wrap=True)]
    columns += [Column(_text(name), justify="right", no_wrap=True) for name in others]
    table = Table(
        *columns,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        title_justify="left",
        title=_text(clean(title)),
        title_style="bold",
    )
    for row in rows:
        cells = [_text("\n".join(filter(None, cell))) for cell in row]
        table.add_row(*cells, style="bold" if row[0][0] == "result" else "")
    return table


def _headers(metric: str) -> list[tuple[str, str]]:
    return [(clean(metric, 16), "") if h[0] == "quality" else h for h in HEADERS]


def _rows(record: Record) -> list[list[tuple[str, str]]]:
    """Return the cells of each model, each of two lines at most."""
    shown = _named(record)
    return [[name, *_cells(m)] for name, m in shown]


def _named(record: Record) -> list[tuple[tuple[str, str], Measurement]]:
    found: list[tuple[tuple[str, str], Measurement]] = []
    for role, m in record.measurements():
        if role == "runner-up":
            found.append(((f"runner-up {sum(n[0].startswith(role) for n, _ in found) + 1}", ""), m))
        else:
            found.append((("result", "") if role == "result" else ("float", clean(m.target, 16)), m))
    return found


def _plans(record: Record) -> list[str]:
    lines = [
        f"{name[0]}: {clean(m.name)} in {clean(m.target, 40)}"
        for name, m in _named(record)
        if name[0] != "float"
    ]
    said = [
        words.chosen_runtime(record.runtimes, record.baselines.target.target),
        describe_recipes(record.recipes),
        describe_zeros(record),
    ]
    return [*lines, *filter(None, said)]


def _cells(m: Measurement) -> list[tuple[str, str]]:
    quality, interval = words.quality_of(m)
    speed, slower = words.speedup_of(m)[0].partition(" (slower)")[:2]
    p50, p95 = words.latency_of(m, "p50_ms")[0], words.latency_of(m, "p95_ms")[0]
    return [
        (quality, "" if quality == words.NOT_MEASURED else interval),
        ("not", "measured") if p50 == words.NOT_MEASURED else (p50, p95),
        _split(speed) if not slower else (speed, "slower"),
        _split(words.size_of(m)),
        _split(words.estimate_of(m.memory_bytes, "bytes")[0]),
        _split(words.operations_of(m)[0]),
    ]


def _split(text: str) -> tuple[str, str]:
    return ("not", "measured") if text == words.NOT_MEASURED else (text, "")


def _joined(cell: tuple[str, str]) -> str:
    first, second = cell
    if first == "not" or not second:
        return " ".join(filter(None, cell))
    if second[0].isdigit() and "to" not in second:
        return words.shared_unit(first, second, " / ")
    return f"{first}, {second}" if first == "float" else f"{first} ({second})"


def _word(status: str) -> str:
    return words.STATUS_WORDS.get(status, "inconclusive")


def _closing(record: Record, report: str | Path | None) -> list[str]:
    lines = [f"failed trials: {count} × {reason}" for reason, count in words.failures(record)[:3]]
    if report is not None:
        lines.append(f"report: {clean(report, 4000)}")
    load = words.how_to_load(record, None if report is None else Path(report).parent)
    return [*lines, "load it with:", *(f"    {clean(line, 4000)}" for line in load)]


def _aligned(headers: list[str], rows: list[list[str]], width: int) -> list[str]:
    """Align the columns, cutting the names to what is left; empty where less than 20 would be left."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    left = width - sum(widths[1:]) - 2 * (len(widths) - 1)
    if left < min(20, widths[0]):
        return []
    widths[0] = min(widths[0], left)
    return [
        "  ".join(
            [clean(row[0], widths[0]).ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in [headers, *rows]
    ]


def _blocks(headers: list[str], rows: list[list[str]], width: int) -> list[str]:
    lines: list[str] = []
    for row in rows:
        lines += _wrapped(row[0], width)
        for header, cell in zip(headers[1:], row[1:], strict=True):
            lines += _wrapped(f"  {header}: {cell}", width)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), subsequent_indent="    ") or [""]


def _text(text: str) -> Text:
    """Foreign strings go to rich as Text, so that `[red]` in a name is no markup."""
    return Text(text)
