"""The command `penjing`: verbs, exit codes and what a person sees when something is refused."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer import TyperException

from penjing.core.errors import Exit, Refused

VERBS = {
    "demo": "optimize",
    "inspect": "diagnose",
    "benchmark": "diagnose",
    "optimize": "optimize",
    "resume": "runs",
    "repair": "runs",
    "status": "runs",
    "report": "runs",
    "compare": "runs",
    "verify": "verify",
    "fit": "fit",
    "tune": "tune",
    "stability": "stability",
    "quantize-lm": "quantize_lm",
    "doctor": "diagnose",
}
"""The module of every verb, in the order of `penjing --help`."""

_CONTROLS = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""What JSON leaves as it is though a terminal may obey it, or cannot encode it."""

app = typer.Typer(
    name="penjing",
    help="Make trained neural networks smaller and faster while their quality holds, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 every limit reached, 2 usage, 3 budget not reached (the best is kept), "
    "4 bad model or data, 5 environment, 130 interrupted but saved.",
)


def _register() -> None:
    for verb, name in VERBS.items():
        module = importlib.import_module(f"penjing.cli.{name}")
        app.command(verb)(_stoppable(getattr(module, verb.replace("-", "_"))))


def _stoppable(verb: Callable[..., int]) -> Callable[..., int]:
    """Say what an interruption leaves behind, and let a reader go away; typer would end without a word."""

    @functools.wraps(verb)
    def command(*args: Any, **kwargs: Any) -> int:
        try:
            return verb(*args, **kwargs)
        except KeyboardInterrupt as interruption:
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
            ):  # all is ended: a second one must not change the code
                signal.signal(number, signal.SIG_IGN)
            _echo(str(interruption) or "interrupted", err=True)
            return int(Exit.INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return int(Exit.DONE)

    return command


def _version(value: bool) -> None:
    if value:
        import penjing

        typer.echo(penjing.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Set the options of the command itself."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a stable code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    _open_streams()
    _register_once()
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before a framework is imported: see search/open.py
    debug = os.environ.get("PENJING_DEBUG") == "1"
    try:
        code = app(arguments, standalone_mode=False, prog_name="penjing")
        sys.stdout.flush()
        return int(code) if isinstance(code, int) else Exit.DONE
    except TyperException as error:
        show = getattr(error, "show", None)
        typer.echo(f"penjing: {error.format_message()}", err=True) if show is None else show(sys.stderr)
        return int(getattr(error, "exit_code", Exit.USAGE))
    except Refused as refusal:
        if debug:
            raise
        return _refused(refusal, "--json" in arguments)


def _open_streams() -> None:
    """Point standard streams that the caller closed at nothing, before a file of ours takes their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.close(number)
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  for good


def _register_once() -> None:
    if not app.registered_commands:
        _register()


def _interrupt(number: int, frame: Any) -> None:
    """Treat SIGTERM like one Ctrl-C: stop after saving."""
    raise KeyboardInterrupt


def _refused(refusal: Refused, as_json: bool) -> int:
    _echo(f"penjing: {refusal}", err=True)
    if as_json:
        error = {
            "rule": refusal.rule,
            "value": None if refusal.value is None else str(refusal.value),
            "place": refusal.place,
            "fix": refusal.fix,
            "code": int(refusal.code),
        }
        emit({"error": error}, True, _echo)
    return int(refusal.code)


def _echo(text: str, *, err: bool = False) -> None:
    """Print a line that may quote foreign strings: names in a file, an exception of the user's code."""
    from penjing.report.words import without_controls

    typer.echo(without_controls(text), err=err)


def emit(data: Any, as_json: bool, words: Callable[[Any], None]) -> None:
    """Print data as JSON, and nothing else on stdout, or hand it to a function that writes for people.

    Whatever a verb prints comes through here, and no control character of a foreign string gets past: JSON
    escapes them, and people get the strings without them.
    """
    if as_json:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False)
        typer.echo(_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
    else:
        from penjing.report.words import strip_controls

        words(strip_controls(data))
