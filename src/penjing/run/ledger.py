"""Results that are finished, kept exactly once, in one SQLite file.

Tables: `results` (one row for a key, never changed) and `events` (append only; an attempt is an event).
Every row carries a SHA-256 over itself, so that a flipped bit is found where SQLite would not notice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from penjing.core.errors import Exit, Refused
from penjing.core.files import free_bytes, refusing

MIGRATIONS = (
    """
    CREATE TABLE results (seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record TEXT NOT NULL,
                          sha256 TEXT NOT NULL);
    CREATE TABLE events (seq INTEGER PRIMARY KEY, key TEXT NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
                         sha256 TEXT NOT NULL);
    CREATE INDEX events_by_key ON events (key, kind);
    """,
)
"""Step n takes a ledger of schema n to schema n + 1; steps are only ever added."""

_APPLICATION = 0x50656E6A  # "Penj", where SQLite keeps the kind of its file
_WAIT_S = 60.0
_ATTEMPT = "attempt"
_TAKEN_BACK = "attempt taken back"
# Columns by name: a name that a flipped bit changed is an error of SQLite then.
_RESULTS = "SELECT seq, key, record, sha256 FROM results"
_EVENTS = "SELECT seq, key, kind, data, sha256 FROM events"


@dataclass(frozen=True)
class Event:
    """Something that happened: the key it is about (may be empty), its kind and plain data.

    >>> Event("trial-1", "attempt", {"number": 1}).kind
    'attempt'
    """

    key: str
    kind: str
    data: dict[str, Any]


class Ledger:
    """The finished results of a run; safe for several processes, and for a kill at any moment.

    Args:
        path: of the SQLite file; it is made, under a lock, where it is missing.
        create: False refuses a missing file instead.

    Raises:
        Refused: the file is damaged (it is moved aside and named), foreign, of a newer version, or the
            disk's reasons.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Ledger(f"{folder}/ledger.sqlite") as ledger:
    ...     ledger.put("trial-1", {"drop": 0.01}), ledger.put("trial-1", {"drop": 0.5}), ledger.get("trial-1")
    (True, False, {'drop': 0.01})
    """

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        self.path = Path(path).absolute()
        self._guard = threading.RLock()  # one connection, so one transaction at a time
        with refusing(self.path):
            self.path.parent.stat()
        with refusing(self.path), FileLock(f"{self.path}.lock", timeout=_WAIT_S):
            if not self.path.exists():
                if not create:
                    raise Refused(
                        "must exist",
                        value="no file",
                        place=str(self.path),
                        fix="restore it from a copy, or start a new run",
                    )
                _make(self.path)
            self._db = _open(self.path)

    def __enter__(self) -> Ledger:
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
        self._db.close()

    def put(self, key: str, record: dict[str, Any]) -> bool:
        """Keep a finished result; True if it is kept now, False if the key had one (which stays)."""
        text = json.dumps(record, sort_keys=True, allow_nan=False)
        with self._writing() as db:
            if db.execute("SELECT 1 FROM results WHERE key = ?", (key,)).fetchone():
                return False
            seq = _next(db, "results")
            row = (seq, key, text, _digest(seq, key, text))
            db.execute("INSERT INTO results VALUES (?, ?, ?, ?)", row)
        return True

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the result of a key, or None."""
        with self._reading() as db:
            row = db.execute(f"{_RESULTS} WHERE key = ?", (key,)).fetchone()
        return None if row is None else _result(row, self.path)[1]

    def all(self) -> list[tuple[str, dict[str, Any]]]:
        """Return every key with its result, in the order in which they were put."""
        with self._reading() as db:
            rows = db.execute(f"{_RESULTS} ORDER BY seq").fetchall()
        return [_result(row, self.path) for row in rows]

    def event(self, kind: str, key: str = "", **data: Any) -> None:
        """Append an event."""
        with self._writing() as db:
            _append(db, key, kind, data)

    def events(self, kind: str | None = None, key: str | None = None) -> list[Event]:
        """Return the events of a kind and a key (None: all), in the order in which they were appended."""
        with self._reading() as db:
            rows = db.execute(
                f"{_EVENTS} WHERE kind = coalesce(?, kind) AND key = coalesce(?, key) ORDER BY seq",
                (kind, key),
            ).fetchall()
        return [_event(row, self.path) for row in rows]

    def attempts(self, key: str) -> int:
        """Return how often work on a key was begun, without the attempts that were taken back."""
        return len(self.events(_ATTEMPT, key)) - len(self.events(_TAKEN_BACK, key))

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

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._guard:
            try:
                yield self._db
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise _refusal(error, self.path) from error

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


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")
    db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")  # damage shows in the hash
    return db


def _make(path: Path) -> None:
    """Make an empty ledger under a temporary name: SQLite itself would leave an empty file for a while."""
    temporary = path.parent / f".penjing-{path.name}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        with contextlib.closing(_connect(temporary)) as db:
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            _migrate(db, 0)
        os.replace(temporary, path)
    except sqlite3.Error as error:
        temporary.unlink(missing_ok=True)
        raise _refusal(error, path) from error


def _open(path: Path) -> sqlite3.Connection:
    db = None
    try:
        if path.stat().st_size == 0:
            raise sqlite3.DatabaseError("the file is empty")
        db = _connect(path)
        _check_kind(db, path)
        found = [row[0] for row in db.execute("PRAGMA integrity_check")]
        if found != ["ok"]:
            raise sqlite3.DatabaseError(str(found[0]))
        version = _version(db)
        if version < len(MIGRATIONS):
            _migrate(db, version)
        _check_rows(db, path)
        return db
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if db is not None:
            db.close()
        if _is_damage(error):
            raise _damaged(error, path, _quarantine(path)) from error
        raise _refusal(error, path) from error
    except Refused:
        if db is not None:
            db.close()
        raise


def _check_kind(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise Refused(
            "must be a ledger that Penjing wrote",
            value="another program's SQLite file, or a damaged one",
            place=str(path),
            fix="restore the ledger from a copy, or start a new run",
        )
    if _version(db) > len(MIGRATIONS):
        from penjing import __version__

        raise Refused(
            f"must have at most schema {len(MIGRATIONS)}, that of penjing {__version__}",
            value=_version(db),
            place=str(path),
            fix="upgrade: pip install -U penjing",
            code=Exit.ENVIRONMENT,
        )


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _migrate(db: sqlite3.Connection, version: int) -> None:
    for number in range(version, len(MIGRATIONS)):
        db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]}; PRAGMA user_version = {number + 1}; COMMIT")


def _check_rows(db: sqlite3.Connection, path: Path) -> None:
    for row in db.execute(_RESULTS):
        if row[3] != _digest(*row[:3]):
            raise sqlite3.DatabaseError(f"result {row[0]} does not match its hash")
    for row in db.execute(_EVENTS):
        if row[4] != _digest(*row[:4]):
            raise sqlite3.DatabaseError(f"event {row[0]} does not match its hash")


def _result(row: tuple[Any, ...], path: Path) -> tuple[str, dict[str, Any]]:
    seq, key, text, digest = row
    if digest != _digest(seq, key, text):
        raise _damaged(f"result {seq} does not match its hash", path, None)
    return key, json.loads(text)


def _event(row: tuple[Any, ...], path: Path) -> Event:
    seq, key, kind, text, digest = row
    if digest != _digest(seq, key, kind, text):
        raise _damaged(f"event {seq} does not match its hash", path, None)
    return Event(key, kind, json.loads(text))


def _append(db: sqlite3.Connection, key: str, kind: str, data: dict[str, Any]) -> None:
    seq, text = _next(db, "events"), json.dumps(data, sort_keys=True, allow_nan=False)
    row = (seq, key, kind, text, _digest(seq, key, kind, text))
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)


def _next(db: sqlite3.Connection, table: str) -> int:
    return int(db.execute(f"SELECT coalesce(max(seq), 0) + 1 FROM {table}").fetchone()[0])


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _is_damage(error: Exception) -> bool:
    # Locked, full and unreadable are OperationalError: the file may be sound. SQLite names real damage
    # DatabaseError itself; a schema that lost a table shows as an OperationalError of a query, and a
    # message that quotes damaged text as a UnicodeDecodeError.
    if isinstance(error, UnicodeDecodeError) or type(error) is sqlite3.DatabaseError:
        return True
    return "no such" in str(error) or "malformed" in str(error)


def _quarantine(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.rename(path, kept)
    journal = path.with_name(f"{path.name}-journal")
    if journal.exists():  # else SQLite would play it back into the next ledger
        os.rename(journal, kept.with_name(f"{kept.name}-journal"))
    return kept


def _damaged(error: object, path: Path, kept: Path | None) -> Refused:
    where = f"; the damaged file is kept as {kept.name}" if kept else ""
    return Refused(
        "must be as it was written",
        value=f"a damaged ledger: {error}{where}",
        place=str(path),
        fix="put back a copy of the ledger, or resume to try the candidates again",
    )


def _refusal(error: Exception, path: Path) -> Refused:
    if _is_damage(error):
        return _damaged(error, path, None)
    return Refused(
        "the ledger must be open to reading and writing",
        value=f"{error} ({free_bytes(path) or 0:,} bytes free)",
        place=str(path),
        fix="free some space, or wait for the other process",
        code=Exit.ENVIRONMENT,
    )
