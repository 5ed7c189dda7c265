"""Temporary folders: they hold users' data, so that those of killed processes are found and removed.

They lie in the run folder where there is one, whose next start removes them, else in the system's folder for
temporary files. There each is locked by its process as long as that lives; whoever makes one next removes
those that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from penjing.core.files import is_temporary, refusing, temporary_name

VARIABLE = "PENJING_SCRATCH"
"""Environment variable that tells child processes where the temporary folders of their run lie."""


@contextmanager
def scratch() -> Iterator[Path]:
    """Give an empty folder that is removed at the end of the block.

    >>> with scratch() as folder:
    ...     (folder / "part").write_bytes(b"12")
    2

    Raises:
        Refused: it cannot be made (environment).
    """
    chosen = os.environ.get(VARIABLE)
    root = Path(chosen or tempfile.gettempdir())
    if not chosen:
        _sweep(root)
    with refusing(root):
        folder, lock = _locked_folder(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def scratch_in(root: Path | str) -> Iterator[None]:
    """Let all temporary folders of this process and its children lie in a folder, for the time of a block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(Path(root).absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def remove_abandoned(root: Path) -> list[Path]:
    """Remove the temporary folders of processes that are no more; return what was removed."""
    removed = []
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if is_temporary(entry.name) and entry.is_dir(follow_symlinks=False) and _abandoned(entry):
                shutil.rmtree(entry.path, ignore_errors=True)
                removed.append(Path(entry.path))
    return removed


@cache
def _sweep(root: Path) -> None:
    remove_abandoned(root)


def _abandoned(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        if entry.stat(follow_symlinks=False).st_uid == os.getuid():
            descriptor = _opened(Path(entry.path))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(descriptor)
            return True
    return False


def _locked_folder(root: Path) -> tuple[Path, int]:
    """Make a folder and lock it; the lock vanishes with this process and the copies that it forks."""
    while True:
        folder = root / temporary_name()
        os.mkdir(folder, 0o700)
        descriptor = _opened(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process takes it for abandoned, just now
            os.close(descriptor)
            continue
        except OSError:  # the file system has no locks: nobody will take it for abandoned
            return folder, descriptor
        if folder.is_dir():
            return folder, descriptor
        os.close(descriptor)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
