"""Results that are finished, kept exactly once, in one SQLite file.

Tables: `results` (one row for a key, never changed), `arrays` (the long lists of a result, read only when
they are needed) and `events` (append only; an attempt is an event). Every row carries a SHA-256 over itself,
so that a flipped bit is found where SQLite would not notice.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penjing.core.errors import Refused
from penjing.core.files import refusing
from penjing.run.ledger_file import (
    EVENTS,
    MIGRATIONS,
    ReadOnly,
    check_arrays,
    check_event,
    check_result,
    how_to_repair,
    make_file,
    open_to_write,
    refusal_of,
)
from penjing.run.ledger_rows import DamagedRow, digest_arrays, digest_row, pack_record, unpack_record

_ATTEMPT = "attempt"
_TAKEN_BACK = "attempt taken back"


@dataclass(frozen=True)
class Event:
    """Something that happened: the key it is about (may be empty), its kind and plain data.

    >>> Event("trial-1", "attempt", {"number": 1}).kind
    'attempt'
    """

    key: str
    kind: str
    data: dict[str, Any]


class LedgerReader:
    """The results and events of a run, to read; as a context manager.

    Nothing is written, not even a lock, so it works on read-only folders and beside the run's driver.

    Args:
        path: of the SQLite file.

    Raises:
        Refused: missing, damaged (now, or when the row is read), foreign, of a newer version, or the
            disk's reasons.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._guard = threading.RLock()  # one connection, so one transaction at a time
        with refusing(self.path, "read"):
            self.path.stat()
            opened = ReadOnly(self.path)
        self._db, self._version, self._close = opened.db, opened.version, opened.close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; all that was put is on disk already."""
        self._close()

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the result of a key, whole, or None."""
        with self._reading() as db:
            row = db.execute(f"{self._results} WHERE key = ?", (key,)).fetchone()
            return None if row is None else self._whole(db, row)[1]

    def all(self) -> list[tuple[str, dict[str, Any]]]:
        """Return every key with its result, whole, in the order in which they were put."""
        with self._reading() as db:
            rows = db.execute(f"{self._results} ORDER BY seq").fetchall()
            return [self._whole(db, row) for row in rows]

    def summaries(self, kind: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every key that begins with `kind`, with its result, in the order in which they were put.

        One row is in memory at a time, and long lists and tables (`penjing.run.ledger_rows.LONG`) are left
        where they are: None stands for them.
        """
        with self._reading() as db:
            for row in db.execute(f"{self._results} ORDER BY seq"):
                if row[1].startswith(kind):
                    check_result(*row)
                    yield row[1], unpack_record(row[2])

    def events(self, kind: str | None = None, key: str | None = None) -> list[Event]:
        """Return the events of a kind and a key (None: all), in the order in which they were appended."""
        with self._reading() as db:
            rows = db.execute(
                f"{EVENTS} WHERE kind = coalesce(?, kind) AND key = coalesce(?, key) ORDER BY seq",
                (kind, key),
            ).fetchall()
            return [_event(row) for row in rows]

    def attempts(self, key: str) -> int:
        """Return how often work on a key was begun, without the attempts that were taken back."""
        return len(self.events(_ATTEMPT, key)) - len(self.events(_TAKEN_BACK, key))

    @property
    def _results(self) -> str:
        arrays = "arrays" if self._version > 1 else "''"
        return f"SELECT seq, key, record, sha256, {arrays} FROM results"

    def _whole(self, db: sqlite3.Connection, row: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
        check_result(*row)
        seq, key, text, _, arrays = row
        data = db.execute("SELECT data FROM arrays WHERE seq = ?", (seq,)).fetchone() if arrays else None
        beside = b"" if data is None else data[0]
        check_arrays(seq, arrays, beside)
        return key, unpack_record(text, beside)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._guard:
            try:
                yield self._db
            except (sqlite3.Error, UnicodeDecodeError, DamagedRow) as error:
                raise refusal_of(error, self.path) from error


class Ledger(LedgerReader):
    """The finished results of a run, to read and write; several processes may, and a kill loses no row.

    Args:
        path: of the SQLite file; it is made, under a lock, where it is missing.
        create: False refuses a missing file instead.

    Raises:
        Refused: the file is damaged, foreign, of a newer version, or the disk's reasons.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Ledger(f"{folder}/ledger.sqlite") as ledger:
    ...     ledger.put("trial-1", {"drop": 0.01}), ledger.put("trial-1", {"drop": 0.5}), ledger.get("trial-1")
    (True, False, {'drop': 0.01})
    """

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        self.path = Path(path).absolute()
        self._guard, self._version = threading.RLock(), len(MIGRATIONS)
        with refusing(self.path):
            self.path.parent.stat()
            if not os.path.lexists(self.path):
                if not create:
                    raise Refused(
                        "must exist",
                        value="no file",
                        place=str(self.path),
                        fix=how_to_repair(self.path),
                    )
                make_file(self.path)
            self._db = open_to_write(self.path)
        self._close = self._db.close

    def put(self, key: str, record: dict[str, Any]) -> bool:
        """Keep a finished result; True if it is kept now, False if the key had one (which stays)."""
        packed = pack_record(record)
        arrays = digest_arrays(packed.arrays)
        with self._writing() as db:
            if db.execute("SELECT 1 FROM results WHERE key = ?", (key,)).fetchone():
                return False
            seq = _next(db, "results")
            sha256 = digest_row(seq, key, packed.text, *([arrays] if arrays else []))
            db.execute("INSERT INTO results VALUES (?, ?, ?, ?, ?)", (seq, key, packed.text, sha256, arrays))
            if arrays:
                db.execute("INSERT INTO arrays VALUES (?, ?)", (seq, packed.arrays))
        return True

    def event(self, kind: str, key: str = "", **data: Any) -> None:
        """Append an event."""
        with self._writing() as db:
            _append(db, key, kind, data)

    def take_back(self, key: str) -> None:
        """Do not count the last attempt: it was ended on purpose (Ctrl-C), not by what was tried."""
        self.event(_TAKEN_BACK, key)

    def begin(self, key: str, most: int = 2) -> int:
        """Note that work on a key begins, durably, and return the number of this attempt, from 1.

        Raises:
            Refused: it was begun `most` times already without a result; it may be what kills the driver.
        """
        with self._writing() as db:
            number = self.attempts(key) + 1
            if number > most:
                raise Refused(
                    f"cannot be begun more than {most} times",
                    place=f"candidate {key}",
                    value=f"{number - 1} attempts without an end",
                    fix="read its log in the run directory's logs/: it may be what kills the driver",
                )
            _append(db, key, _ATTEMPT, {"number": number})
        return number

    def restore(
        self, results: Iterable[tuple[Any, ...]], events: Iterable[tuple[Any, ...]]
    ) -> tuple[int, int]:
        """Take over rows of another ledger as they are; return how many results and events.

        Args:
            results: the columns of `results`, then the data of `arrays` or None.
            events: the columns of `events`.
        """
        counts = [0, 0]
        with self._writing() as db:
            for *row, data in results:
                db.execute("INSERT INTO results VALUES (?, ?, ?, ?, ?)", row)
                if data is not None:
                    db.execute("INSERT INTO arrays VALUES (?, ?)", (row[0], data))
                counts[0] += 1
            for event in events:
                db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", event)
                counts[1] += 1
        return counts[0], counts[1]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def _event(row: tuple[Any, ...]) -> Event:
    check_event(*row)
    _, key, kind, text, _ = row
    return Event(key, kind, unpack_record(text))


def _append(db: sqlite3.Connection, key: str, kind: str, data: dict[str, Any]) -> None:
    seq, text = _next(db, "events"), json.dumps(data, sort_keys=True, allow_nan=False)
    row = (seq, key, kind, text, digest_row(seq, key, kind, text))
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)


def _next(db: sqlite3.Connection, table: str) -> int:
    return int(db.execute(f"SELECT coalesce(max(seq), 0) + 1 FROM {table}").fetchone()[0])
