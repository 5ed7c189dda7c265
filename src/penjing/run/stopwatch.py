"""The seconds that a run has taken, all its sessions together, those that were killed too."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from penjing.core.files import refusing

INTERVAL_S = 0.5
"""So often the seconds are noted; a kill loses at most so much."""

_WIDTH = 24


class Stopwatch:
    """Counts seconds from `before` on, by the monotonic clock, and notes them in a file; a context manager.

    The note is one number of fixed width that is written over: a kill leaves the one before.

    Args:
        path: of the file.
        before: seconds of earlier sessions.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Stopwatch(Path(folder) / "elapsed", 5.0) as watch:
    ...     watch.elapsed >= read_elapsed(watch.path) >= 5.0
    True
    """

    def __init__(self, path: Path | str, before: float = 0.0) -> None:
        self.path = Path(path)
        self._before = before
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="stopwatch", daemon=True)

    def __enter__(self) -> Stopwatch:
        with refusing(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._note()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._note()
        os.close(self._file)

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self._before + time.monotonic() - self._started

    def _tick(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            with contextlib.suppress(OSError):  # a full disk ends the run elsewhere, with words
                self._note()

    def _note(self) -> None:
        os.pwrite(self._file, f"{self.elapsed:>{_WIDTH}.3f}\n".encode(), 0)


def read_elapsed(path: Path | str) -> float | None:
    """Return the seconds that were noted last; None where there is no such file, or it is damaged.

    >>> print(read_elapsed("no/such/file"))
    None
    """
    try:
        seconds = float(Path(path).read_text("ascii"))
    except (OSError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
