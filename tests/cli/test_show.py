"""Progress for people: a live line on a terminal, every line elsewhere, nothing when JSON is asked for."""

import io
import re

from rich.console import Console

from penjing.cli.show import Reporter
from penjing.core.progress import Line
from penjing.report.progress import Progress

LINES = (
    Line.note("run directory: runs/a"),
    Line.phase("trying Int8Static()"),
    Line.training("epoch 1 of 3: loss 0.5").under("Distill"),
    Line.trial("done: Int8Static(): fine"),
)
TEXTS = [line.text for line in LINES]


def shown(console, plain):
    reporter = Reporter(quiet=True)
    reporter._progress = Progress(console, plain=plain)
    with reporter:
        for line in LINES:
            reporter(line)
    return console.file.getvalue()


def test_without_a_terminal_every_line_is_printed_once():
    text = shown(Console(file=io.StringIO()), plain=True)
    assert text.splitlines() == TEXTS


def test_on_a_terminal_results_stay_and_activities_live_on_the_bar():
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=100), plain=False)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")
    stays = [line.strip() for line in plain.splitlines() if line.strip() in TEXTS]
    assert stays == [TEXTS[0], TEXTS[3]]
    assert "trying Int8Static()" in plain


def test_quiet_prints_nothing(capsys):
    with Reporter(quiet=True) as reporter:
        for line in LINES:
            reporter(line)
    assert capsys.readouterr() == ("", "")
