"""Progress of a run in the terminal, and what a console can show.

Colour and live redrawing need a terminal that can do them; pipes, CI, `NO_COLOR` and dumb terminals get
plain lines of the same content.
"""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from penjing.report.words import clean


def is_plain(console: Console) -> bool:
    """Tell whether a console gets plain lines: no terminal, a dumb one, `NO_COLOR`, `CI`, or not UTF-8."""
    asked = any(os.environ.get(name) for name in ("NO_COLOR", "CI"))
    return asked or not console.is_terminal or console.is_dumb_terminal or not _is_unicode(console)


def console(*, stderr: bool = False) -> Console:
    """Return a console with rich's guessing off: no markup, emoji or highlighting of foreign strings."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class _Console(Console):
    """A console that goes quiet when its reader is gone; rich itself would end the program with code 1."""

    def on_broken_pipe(self) -> None:
        """Drop what is written from here on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _is_unicode(console: Console) -> bool:
    return (console.encoding or "").lower().startswith("utf")


def write(console: Console, text: str) -> None:
    """Print without markup, wrapping or colour, whatever the encoding of the stream."""
    if not _is_unicode(console):
        text = text.encode(console.encoding or "ascii", "replace").decode(console.encoding or "ascii")
    console.print(Text(text), soft_wrap=True, no_wrap=True, highlight=False, crop=False)


class Progress:
    """Progress of a run: a live bar on a terminal, else one line for each event.

    Written to `on`, by default the standard error; `plain` overrides what `is_plain` finds. Use as a
    context manager: `stage` names what goes on now (with the amount of work where it is
    known), `update` and `advance` move the bar, `say` prints a line that stays. Every string may be
    foreign: control characters are removed and nothing is taken for markup.

    >>> import io
    >>> out = io.StringIO()
    >>> with Progress(Console(file=out)) as progress:
    ...     progress.stage("search", total=3)
    ...     progress.advance("trial 1: kept")
    >>> print(out.getvalue().strip())
    search
    search 1/3: trial 1: kept
    """

    def __init__(self, on: Console | None = None, *, plain: bool | None = None) -> None:
        self._console = on or console(stderr=True)
        self._name, self._done, self._total = "", 0.0, 0.0
        self._said = 0.0
        self._bar: rich_progress.Progress | None = None
        self._task: Any = None
        if not (is_plain(self._console) if plain is None else plain):
            self._bar = rich_progress.Progress(
                *_bar_columns(self._console.width), console=self._console, transient=True
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage; `total` is its amount of work (trials, epochs, seconds), None where unknown."""
        self._name, self._done, self._total = clean(name, 80), 0.0, total or 0.0
        if self._bar is None:
            self.say(name)
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(self._name, total=total)

    def update(self, done: float, text: str = "") -> None:
        """Set how much of the stage is done; a text is shown beside the bar, or as a line of its own."""
        self._done = done
        text = clean(text, 160)
        if self._bar is not None and self._task is not None:
            shown = f"{self._name}: {text}" if text else self._name
            self._bar.update(self._task, completed=done, description=shown)
        elif self._bar is None and (text or time.monotonic() - self._said >= 10):
            # Without a terminal a bare tick is news only now and then.
            count = f" {done:g}/{self._total:g}" if self._total else ""
            self._line(f"{self._name}{count}{': ' if text else ''}{text}")

    def advance(self, text: str = "", by: float = 1) -> None:
        """Move the stage on by some work."""
        self.update(self._done + by, text)

    def detail(self, text: str) -> None:
        """Show what the stage is at: beside the spinner on a terminal, else as a line of its own."""
        if self._bar is None:
            self.say(text)
        else:
            self.update(self._done, text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._line(clean(text, 1000))

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        if self._bar is None:
            write(self._console, text)
        else:
            self._console.print(Text(text))


def _bar_columns(width: int) -> list[rich_progress.ProgressColumn | str]:
    """Choose the parts of the bar that fit: on a narrow terminal only the words and the share."""
    column = Column(no_wrap=True, overflow="ellipsis")
    name = rich_progress.TextColumn("{task.description}", markup=False, table_column=column)
    parts = [rich_progress.SpinnerColumn(), name, rich_progress.TaskProgressColumn()]
    if width < 60:
        return [*parts]
    return [*parts, rich_progress.BarColumn(bar_width=min(30, width // 4)), rich_progress.TimeElapsedColumn()]
