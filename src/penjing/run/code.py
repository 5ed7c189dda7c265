"""Which code a run directory may start: not its own, and not what lies where the user happens to stand.

A run directory names the task file that it was started from, and `resume` and `verify` run that file.
Whoever sends a run directory writes that name, so it counts only where it leads to a file of the user's.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path

from penjing.core.errors import Exit, Refused
from penjing.core.files import sha256_file
from penjing.run.folder import RunFolder


def locate_task_file(run: RunFolder, recorded: str | None, verb: str) -> Path:
    """Return the task file that a run was started from, resolved.

    Args:
        run: the run directory.
        recorded: what its configuration says.
        verb: of the command line that would run it, for the way out.

    Raises:
        Refused: it names none; a path that is not whole or leads over a link or `..`; or a file inside of the
            run directory or the current one. Whoever trusts the file names it on the command line.

    >>> locate_task_file(RunFolder(Path("runs/mine")), "task.py", "resume")
    Traceback (most recent call last):
        ...
    penjing.core.errors.Refused: task_file in runs/mine/config.resolved.yaml must be a whole path ...
    """
    place = f"task_file in {run.config}"
    if recorded is None:
        raise Refused(
            "needs a task file",
            value="a run that was started from Python",
            place=str(run.path),
            fix="name one with --task TASK.py, or call pj.optimize again with the same arguments and out=",
            code=Exit.USAGE,
        )
    path = Path(recorded.replace("\0", ""))
    resolved = Path(os.path.realpath(path))
    if not path.is_absolute() or str(resolved) != recorded:
        raise _unsafe("must be a whole path without links and ..", recorded, place, run, verb, resolved)
    for folder, words in ((run.path, "the run directory"), (Path.cwd(), "the current directory")):
        if _lies_in(resolved, folder):
            raise _unsafe(f"cannot lie in {words}", recorded, place, run, verb, resolved)
    return resolved


def _lies_in(path: Path, folder: Path) -> bool:
    """Compare by device and inode, which no spelling of a name and no mount gets around."""
    for parent in path.parents:
        with contextlib.suppress(OSError):
            if parent.samefile(folder):
                return True
    return False


def _unsafe(rule: str, recorded: str, place: str, run: RunFolder, verb: str, resolved: Path) -> Refused:
    """Return the refusal, with the file that the name leads to and its hash."""
    try:
        found = f"{resolved} with sha256 {sha256_file(resolved)}" if resolved.is_file() else "no file"
    except OSError:
        found = f"{resolved}, which cannot be read"
    command = f"penjing {verb} {shlex.quote(str(run.path))} --task {shlex.quote(str(resolved))}"
    return Refused(
        rule,
        value=found if recorded == str(resolved) else f"{recorded}, that is {found}",
        place=place,
        fix=f"read that file; if you trust it, name it yourself: `{command}`",
        code=Exit.USAGE,
    )
