"""The report in a real headless Chromium: charts are drawn, nothing overflows, nothing is logged."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from penjing.report.html import render
from penjing.report.record import Record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
]
CHARTS = {"pareto", "ablation-latency", "ablation-quality", "distribution", "classes"}
PROBE = """<script>addEventListener("load", () => setTimeout(() => parent.postMessage({
  inner: innerWidth, scroll: document.documentElement.scrollWidth,
  charts: document.documentElement.dataset.charts,
  wide: [...document.querySelectorAll("canvas")]
    .filter((c) => c.clientWidth > c.parentElement.clientWidth).length,
}, "*"), 800));</script></body>"""


def chromium(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """Open a file and return the DOM after its scripts ran, and what the console said."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=4000",
        *flags,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode(), "\n".join(console)


def drawn(dom: str) -> set[str]:
    return {
        match.group(1)
        for tag in re.findall(r"<canvas[^>]*>", dom)
        if "data-chart=" in tag and (match := re.search(r'id="([^"]+)"', tag))
    }


def test_charts_are_drawn_under_the_policy_without_a_word_on_the_console(
    record: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(Record.model_validate(record)), "utf-8")
    dom, console = chromium(page, tmp_path / "profile", "--window-size=1400,1000")
    assert console == ""
    assert drawn(dom) == CHARTS
    assert 'data-charts="5"' in dom
    assert "16 of 16 rows" in dom


def test_an_injected_script_does_not_run(record: dict[str, Any], tmp_path: Path) -> None:
    record["name"] = "</title><script>document.documentElement.dataset.hacked = 1</script>"
    page = tmp_path / "report.html"
    text = render(Record.model_validate(record))
    # Even if escaping failed, the policy would stop a third script.
    forced = "<script>document.documentElement.dataset.hacked = 2</script></body>"
    page.write_text(text.replace("</body>", forced), "utf-8")
    dom, console = chromium(page, tmp_path / "profile")
    assert "data-hacked" not in re.findall(r"<html[^>]*>", dom)[0]
    assert drawn(dom) == CHARTS
    assert "Content Security Policy" in console


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_page(record: dict[str, Any], tmp_path: Path, width: int) -> None:
    # A window cannot be narrower than 500 pixels; a frame can. The probe needs the policy out of the way.
    record["changes"][0]["layer"] = "a_very_long_layer_name_without_a_space." * 8
    record["name"] = "n" * 200
    record["verdict"]["limits"]["latency"]["reason"] = "x" * 300
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(Record.model_validate(record))
    )
    (tmp_path / "report.html").write_text(text.replace("</body>", PROBE), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="report.html" width="{width}" height="900" '
        'style="border:0"></iframe>'
        "<script>onmessage = (e) => { document.body.dataset.probe = JSON.stringify(e.data); }</script>",
        "utf-8",
    )
    dom, console = chromium(frame, tmp_path / "profile", "--window-size=1500,1000")
    found = re.search(
        r"data-probe=\"\{&quot;inner&quot;:(\d+),&quot;scroll&quot;:(\d+),"
        r"&quot;charts&quot;:&quot;(\d)&quot;,&quot;wide&quot;:(\d+)",
        dom,
    )
    assert found is not None, dom[:500]
    inner, scroll, charts, wide = map(int, found.groups())
    assert (inner, charts, wide) == (width, 5, 0)
    assert scroll <= inner
    assert console == ""
