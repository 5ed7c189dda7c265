"""The terminal: the same content everywhere, whatever the console can do and whatever the names hold."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from penjing.report.record import Record
from penjing.report.terminal import Progress, console, final_table, plain_table
from penjing.report.words import clean

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]")
OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def terminal(width: int, **options: Any) -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=width, force_terminal=True, **options)


def said(on: Console) -> str:
    on.file.flush()
    return on.file.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]


def table(record: dict[str, Any], on: Console) -> str:
    final_table(Record.model_validate(record), on, "runs/digits-1/report.html")
    return said(on)


def test_the_table_has_every_model_limit_and_the_way_on(record: dict[str, Any]) -> None:
    text = OURS.sub("", table(record, terminal(100)))
    for words in (
        "torch eager",
        "onnxruntime",
        "97.83%",
        "96.73 to 98.93%",
        "0.081 ms",
        "0.0972 ms",
        "31.3 kB",
        "48 MB",
        "1.19 M",
        "runner-up 2",
        "slower",
        "✓ reached",
        "Quality drop",
        "Latency",
        "Size on disk",
        "All 3 limits are reached",
        "report: runs/digits-1/report.html",
        "import penjing as pj",
        "predict = pj.load('runs/digits-1/trials/5/artefact')",
        "failed trials: 2 ×",
    ):
        assert words in text, words
    assert re.search(r"not +\S* +4\.63 M|not measured", text)


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 120])
def test_no_width_loses_a_number(record: dict[str, Any], width: int) -> None:
    text = " ".join(OURS.sub("", table(record, terminal(width))).split())
    for words in ("98.17%", "97.83%", "0.262", "0.081", "312 kB", "31.3 kB", "1.19 M", "pj.load("):
        assert words in text, words
    assert "…" not in text


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_plain_lines_keep_the_width(record: dict[str, Any], width: int) -> None:
    lines = plain_table(Record.model_validate(record), width=width).splitlines()
    exempt = ("failed trials", "    predict", "    import", "report:")
    assert max(len(line) for line in lines if not line.startswith(exempt)) <= max(width, 20)


@pytest.mark.parametrize("name", ["NO_COLOR", "CI", "TERM"])
def test_environment_asks_for_plain_lines(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "dumb" if name == "TERM" else "1")
    text = table(record, terminal(100))
    assert "\x1b" not in text
    assert "reached: Quality drop" in text


def test_a_pipe_gets_plain_lines(record: dict[str, Any]) -> None:
    on = Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"))
    text = table(record, on)
    assert "\x1b" not in text
    assert "─" not in text
    assert re.search(r"^result +97\.83% \(96\.73 to 98\.93%\) +0\.081 / 0\.0972 ms +3\.23×", text, re.M)


def test_an_ascii_stream_does_not_break(record: dict[str, Any]) -> None:
    on = Console(file=io.TextIOWrapper(io.BytesIO(), "ascii"), force_terminal=True, width=100)
    record["name"] = "盆景"
    assert "97.83%" in table(record, on)


HOSTILE = "[red]m[/red]\x1b[31m\x1b]0;owned\x07\x9b31m\r\nnext\u202egnp[/]"


@pytest.mark.parametrize("width", [40, 120])
def test_hostile_names_are_only_text(record: dict[str, Any], width: int) -> None:
    record["name"] = record["result"]["name"] = record["result"]["target"] = HOSTILE
    record["verdict"]["limits"]["size"]["reason"] = HOSTILE
    record["trials"][-1]["reason"] = HOSTILE
    record["artefact"]["path"] = "x'\x1b[2J\n; import os"
    for metric in (record["result"], *record["runners_up"]):
        metric["metric"] = HOSTILE
    text = table(record, terminal(width))
    text = OURS.sub("", text)
    assert "[red]m[/red]" in text
    assert not CONTROL.search(text)
    assert "owned" not in text
    assert "\\x1b[2J\\n" in text


def test_states_other_than_reached_are_words(record: dict[str, Any]) -> None:
    record["verdict"]["status"] = record["verdict"]["limits"]["size"]["status"] = "not_reached"
    record["verdict"]["limits"]["latency"].update(
        status="inconclusive", reason="the interval holds the limit"
    )
    text = plain_table(Record.model_validate(record), width=200)
    assert "not reached: Size on disk" in text
    assert "inconclusive: Latency" in text
    assert "(the interval holds the limit)" in text
    assert "1 of 3 limits not reached; this is the best that was found" in text


def test_failed_trials_are_grouped_by_reason(record: dict[str, Any]) -> None:
    text = plain_table(Record.model_validate(record), width=120)
    assert "failed trials: 2 × the worker was killed" in text


def test_the_torch_target_needs_the_users_class(record: dict[str, Any]) -> None:
    record["config"]["target"] = {"runtime": "torch", "mode": "eager"}
    assert "model=make_model" in plain_table(Record.model_validate(record))


def test_progress_in_a_pipe_is_one_line_an_event() -> None:
    on = Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=40)
    with Progress(on) as progress:
        progress.stage("search", total=3)
        progress.advance("trial 1: keeps every limit, and this line is longer than the console")
        progress.advance()
        progress.update(3, "done")
        progress.stage("certify")
        progress.advance("reading")
        progress.say(HOSTILE)
    assert said(on).splitlines() == [
        "search",
        "search 1/3: trial 1: keeps every limit, and this line is longer than the console",
        "search 3/3: done",
        "certify",
        "certify: reading",
        "[red]m[/red] nextgnp[/]",
    ]


@pytest.mark.parametrize("width", [1, 20, 40, 80])
def test_progress_on_a_terminal_is_live_and_survives_every_width(width: int) -> None:
    on = terminal(width)
    with Progress(on) as progress:
        progress.stage(f"search {HOSTILE}", total=2)
        progress.advance(HOSTILE * 20)
        progress.say("kept " + HOSTILE)
        progress.advance()
        progress.stage("certify")
    text = said(on)
    assert "\x1b[?25l" in text
    assert text.rstrip("\r\n").count("\x1b[?25h") == 1
    assert not CONTROL.search(OURS.sub("", text).replace("\r", ""))
    if width >= 40:
        assert "kept [red]m[/red]" in text


def test_progress_ends_when_the_work_raises() -> None:
    on = terminal(80)

    def work() -> None:
        with Progress(on) as progress:
            progress.stage("search")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert "\x1b[?25h" in said(on)


def test_progress_speaks_on_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(plain=True) as progress:
        progress.say("hello [b]world[/b]")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello [b]world[/b]\n")
    assert console(stderr=True).stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a b c"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"),
        ("\ud800", "?"),
        ("zero\u200bwidth", "zerowidth"),
        ("é 盆景 ✓", "é 盆景 ✓"),
        (Path("a/b"), "a/b"),
        ("", ""),
    ],
)
def test_clean(text: object, shown: str) -> None:
    assert clean(text) == shown


def test_clean_cuts_and_says_so() -> None:
    assert clean("x" * 500, 10) == "x" * 9 + "…"
    assert len(clean("\x1b[31m" * 10_000 + "x")) <= 400
