"""The report of a run: one HTML file that opens offline, its numbers readable without JavaScript."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from penjing.core.files import write_text
from penjing.report.charts import MAX_CLASSES, MAX_POINTS, build_charts, dump_script_json
from penjing.report.record import Record
from penjing.report.view import build_view
from penjing.report.words import clean

MAX_BYTES = 1_900_000
"""Largest report in bytes; longer tables are cut, and the page says so."""


def render(record: Record, folder: Path | None = None) -> str:
    """Return the report of a run's record as one HTML document below 2 MB.

    Every string of the record is escaped and stripped of control characters; the page makes no request
    and its content security policy lets only its own two scripts run. `folder` is the run directory.
    """
    own, assets = load_template("report.html.j2"), load_page_assets("report.js")
    rows = 3000
    while True:
        page = own.render(
            **build_view(record, rows, folder),
            **assets,
            rows_shown=rows,
            max_points=MAX_POINTS,
            max_classes=MAX_CLASSES,
            charts=dump_script_json(build_charts(record)),
        )
        if rows <= 50 or len(page.encode()) <= MAX_BYTES:
            return page
        rows //= 2


def write_report(record: Record, path: str | Path) -> Path:
    """Render a record and write it atomically; returns the path.

    Raises:
        Refused: the file cannot be written.
    """
    path = Path(path)
    write_text(path, render(record, path.parent))
    return path


def _printable(value: Any) -> Any:
    return clean(value, 4000) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("penjing.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )


def load_template(name: str) -> Template:
    """Return a template of this package, whose values are escaped and stripped of control characters."""
    return _environment().get_template(name)


@cache
def load_page_assets(name: str) -> dict[str, Markup]:
    """Return the style and the scripts of a page, with the hashes that its content security policy names.

    Args:
        name: of the page's own script, which draws by Chart.js.
    """
    folder = files("penjing.report")
    library = (folder / "vendor" / "chart.umd.min.js").read_text("utf-8")
    script = (folder / "templates" / name).read_text("utf-8")
    return {
        "style": Markup((folder / "templates" / "report.css").read_text("utf-8")),
        "library": Markup(library),
        "script": Markup(script),
        "hashes": Markup(" ".join(f"'sha256-{_digest(text)}'" for text in (library, script))),
    }


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
