"""Numbers, intervals and foreign strings as words; shared by the terminal and the HTML file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penjing.core.budget import say
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured
from penjing.core.verdict import LimitVerdict, is_share
from penjing.report.record import Record, RuntimeRows

Json = Mapping[str, Any]

NOT_MEASURED = "not measured"
RECALL = "recall_macro"
"""The metric whose way of writing recall by class follows: as a percentage."""
STATUS_WORDS = {"reached": "reached", "not_reached": "not reached", "inconclusive": "inconclusive"}
STATUS_MARKS = {"reached": "✓", "not_reached": "✗", "inconclusive": "?"}
LIMIT_TITLES = {
    "max_drop": "Quality drop",
    "latency": "Latency",
    "size": "Size on disk",
    "memory": "Peak memory",
    "operations": "Multiply-adds",
    "time": "Time of the run",
    "trials": "Trials",
}

_ESCAPE_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC: titles, links
    r"|\x1b[@-Z\\-_]"
)


def clean(text: object, limit: int = 400) -> str:
    """Return a foreign string fit to show: one line, no control or direction-changing characters.

    Terminal escape sequences are removed whole, lone surrogates become `?`, and what is longer than
    `limit` characters is cut with an ellipsis.

    >>> clean("run\\n\\x1b[31mred\\x1b[0m\\u202ename")
    'run redname'
    """
    shown = " ".join(without_controls(str(text)[: 4 * limit]).split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def without_controls(text: str) -> str:
    """Return a foreign string as one line, without what a terminal or the direction of text obeys.

    >>> without_controls("a  path\\n\\x1b[31mred\\x9b0m")
    'a  path red'
    """
    return "".join(map(_shown, _ESCAPE_SEQUENCE.sub("", text)))


def strip_controls(data: Any) -> Any:
    """Return plain data, every string of which (keys too) went through `without_controls`.

    >>> strip_controls({"name": ["\\x1b]0;owned\\x07net", 3]})
    {'name': ['net', 3]}
    """
    if isinstance(data, str):
        return without_controls(data)
    if isinstance(data, Mapping):
        return {strip_controls(key): strip_controls(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [strip_controls(value) for value in data]
    return data


def _shown(character: str) -> str:
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category == "Cs":
        return "?"
    return "" if category in ("Cc", "Cf") else character


def number(value: float | None) -> str:
    """Return a number with four significant digits; an em dash where there is none.

    >>> number(0.123456), number(1234567), number(None)
    ('0.1235', '1,234,567', '—')
    """
    if value is None:
        return "—"
    if isinstance(value, int) or 1e3 <= abs(value) < 1e15:
        return f"{round(value):,}"
    return f"{value:.4g}"


def quality(value: float | None, metric: str) -> str:
    """Return a value of the metric: `97.80%` for a share, else four significant digits.

    >>> quality(0.978, "accuracy"), quality(12.34567, "perplexity")
    ('97.80%', '12.35')
    """
    if value is None:
        return "—"
    return f"{value * 100:.2f}%" if is_share(metric) else number(value)


def drop(value: float | None, metric: str, signed: bool = False) -> str:
    """Return a difference of the metric: in percentage points for a share.

    >>> drop(0.0042, "accuracy"), drop(-0.25, "perplexity", signed=True)
    ('0.42 points', '-0.25')
    """
    if value is None:
        return "—"
    sign = "+" if signed else ""
    return f"{value * 100:{sign}.2f} points" if is_share(metric) else f"{value:{sign}.4g}"


def amount(value: float | None, unit: str) -> str:
    """Return a quantity in people's units: `ms`, `bytes`, `s`, `count` or a plain number.

    >>> amount(36_600, "bytes"), amount(0.0512, "ms"), amount(None, "ms")
    ('36.6 kB', '0.0512 ms', '—')
    """
    if value is None:
        return "—"
    return say(value, unit) if unit in ("ms", "bytes", "s", "count") else f"{number(value)} {unit}".strip()


def shared_unit(low: str, high: str, joint: str) -> str:
    """Join two quantities, naming a unit that both have only once.

    >>> shared_unit("0.21 ms", "0.25 ms", " / ")
    '0.21 / 0.25 ms'
    """
    unit = re.search(r"(?: [^\d\s]+|[%×])$", high)
    if unit is not None and low.endswith(unit.group()):
        low = low.removesuffix(unit.group())
    return f"{low}{joint}{high}"


def between(low: str, high: str) -> str:
    """Join the two ends of an interval.

    >>> between("0.21 ms", "0.25 ms"), between("97.1%", "98.2%"), between("900 kB", "1.1 MB")
    ('0.21 to 0.25 ms', '97.1 to 98.2%', '900 kB to 1.1 MB')
    """
    return shared_unit(low, high, " to ")


def percent(value: float) -> str:
    """Return a confidence or a share: `95%`, `99.5%`."""
    return f"{value * 100:.4g}%"


def quality_of(m: Measurement) -> tuple[str, str]:
    """Return the quality of a measurement and its interval (or why it was not measured)."""
    if isinstance(m.quality, NotMeasured):
        return NOT_MEASURED, clean(m.quality.reason)
    q = m.quality
    return quality(q.value, m.metric), between(quality(q.low, m.metric), quality(q.high, m.metric))


def estimate_of(value: Estimate | NotMeasured, unit: str) -> tuple[str, str]:
    """Return an estimate and its interval (or why it was not measured)."""
    if isinstance(value, NotMeasured):
        return NOT_MEASURED, clean(value.reason)
    if value.low == value.high:
        return amount(value.value, unit), ""
    return amount(value.value, unit), between(amount(value.low, unit), amount(value.high, unit))


def latency_of(m: Measurement, name: str) -> tuple[str, str]:
    """Return one of `p50_ms`, `p95_ms`, `p99_ms` with its interval (or why it was not measured)."""
    if isinstance(m.latency, NotMeasured):
        return NOT_MEASURED, clean(m.latency.reason)
    return estimate_of(getattr(m.latency, name), "ms")


def speedup_of(m: Measurement) -> tuple[str, str]:
    """Return how many times faster than its reference a measurement is, with the interval.

    Below 1 it is slower, and the words say so.
    """
    if isinstance(m.latency, NotMeasured):
        return NOT_MEASURED, clean(m.latency.reason)
    ratio = m.latency.ratio
    if ratio is None or ratio.low <= 0:
        return "—", "reference" if m.latency.reference in ("", m.name) else "no paired ratio"
    word = " (slower)" if ratio.low > 1 else ""
    return f"{1 / ratio.value:.2f}×{word}", between(f"{1 / ratio.high:.2f}×", f"{1 / ratio.low:.2f}×")


def size_of(m: Measurement) -> str:
    """Return the size on disk."""
    return NOT_MEASURED if m.size_bytes is None else amount(m.size_bytes, "bytes")


def operations_of(m: Measurement) -> tuple[str, str]:
    """Return the multiply-adds; a lower bound, with the operators named, where some have no formula."""
    if m.operations is None:
        return NOT_MEASURED, ""
    uncounted = m.operations.uncounted
    if not uncounted:
        return amount(m.operations.multiply_adds, "count"), ""
    names = ", ".join(clean(name, 60) for name in uncounted[:8])
    return f"≥ {amount(m.operations.multiply_adds, 'count')}", f"{len(uncounted)} not counted: {names}"


def in_unit(value: float | None, name: str, unit: str, metric: str) -> str:
    """Return a value of a limit in the words of that limit."""
    return drop(value, metric) if name == "max_drop" else amount(value, unit)


def limit_sentence(name: str, limit: LimitVerdict, metric: str) -> str:
    """Say what was measured against a limit, with the interval, the bound and the baseline."""
    unit = clean(limit.unit, 20)

    def words(value: float | None) -> str:
        return in_unit(value, name, unit, metric)

    measured, low, high = limit.measured, limit.low, limit.high
    if measured is None:
        return f"{NOT_MEASURED}; the limit is {words(limit.limit)}"
    interval = "" if low is None or high is None or low == high else f" ({between(words(low), words(high))})"
    text = f"measured {words(measured)}{interval}; the limit is {words(limit.limit)}"
    baseline = limit.baseline
    if baseline is None:
        return text
    if name == "max_drop":
        return f"{text}; the baseline has {quality(baseline, metric)}"
    share = f", of which this is {percent(round(measured / baseline, 3))}" if baseline else ""
    return f"{text}; the baseline needs {words(baseline)}{share}"


def title_of(name: str) -> str:
    """Return the title of a limit."""
    return LIMIT_TITLES.get(name, clean(name, 40))


def plan_words(plan: Any) -> list[str]:
    """Return each step of a plan as `Method(field=value) on pattern`."""
    return [_step_words(step) for step in plan or ()]


def _step_words(step: Json) -> str:
    fields = ", ".join(f"{k}={v!r}" for k, v in step.items() if k not in ("method", "only"))
    on = f" on {step['only']}" if "only" in step else ""
    return clean(f"{step.get('method', '?')}({fields}){on}")


def flat(data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Walk nested plain data as dotted names and cleaned texts.

    >>> list(flat({"cpu": {"cores": 2}, "tags": ["a", "b"]}))
    [('cpu.cores', '2'), ('tags', 'a, b')]
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from flat(value, f"{prefix}.{clean(key, 80)}" if prefix else clean(key, 80))
    elif isinstance(data, list | tuple) and not any(isinstance(x, Mapping) for x in data):
        yield prefix, clean(", ".join(str(x) for x in data))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from flat(value, f"{prefix}[{index}]")
    else:
        yield prefix, "—" if data is None else clean(data)


def how_to_load(record: Record, folder: Path | None = None) -> tuple[str, str]:
    """Return the two lines of Python that load the delivered artefact.

    `folder` is the run directory, which a relative path of the artefact starts from.
    """
    name = record.artefact.path
    path = Path(name) if folder is None else folder.absolute() / name
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    model = ", model=make_model" if record.config.target.runtime == "torch" else ""
    return "import penjing as pj", f"predict = pj.load({str(path)!r}{model})"


def chosen_runtime(runtimes: RuntimeRows, reference: str) -> str:
    """Say what the chosen runtime and precision gain alone; nothing where the baseline runs there.

    `reference` names the target of the baseline.
    """
    row = runtimes.rows.get(runtimes.chosen)
    latency = None if row is None or row.measurement is None else row.measurement.latency
    if not isinstance(latency, Latency) or latency.ratio is None:
        return ""
    value = latency.ratio.value
    how = f"{1 / value:.2f} times faster" if value <= 1 else f"{value:.2f} times slower"
    where = clean(reference or "the baseline", 60)
    return (
        f"{clean(runtimes.chosen, 60)} alone makes the float model {how} than {where}, which quality "
        "and speed-ups are counted from."
    )


def metric_of(record: Record) -> str:
    """Return the name of the metric that judges, fit to show."""
    return clean(record.metric, 60)


def median_ms(m: Measurement | None) -> float | None:
    """Return the median latency in milliseconds where it was measured."""
    return m.latency.p50_ms.value if m is not None and isinstance(m.latency, Latency) else None


def failures(record: Record) -> list[tuple[str, int]]:
    """Group the failed trials by reason, the most frequent first."""
    counts: dict[str, int] = {}
    for trial in record.trials:
        if trial.status == "failed":
            reason = clean(trial.reason or "no reason given")
            counts[reason] = counts.get(reason, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
