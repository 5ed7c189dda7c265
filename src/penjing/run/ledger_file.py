"""The SQLite file of the ledger: made, opened, migrated, checked; its faults named."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import shlex
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penjing.core.errors import Exit, Refused
from penjing.core.files import free_bytes
from penjing.run.ledger_rows import MOST_BYTES, DamagedRow, digest_arrays, digest_row

MIGRATIONS = (
    """
    CREATE TABLE results (seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record TEXT NOT NULL,
                          sha256 TEXT NOT NULL);
    CREATE TABLE events (seq INTEGER PRIMARY KEY, key TEXT NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
                         sha256 TEXT NOT NULL);
    CREATE INDEX events_by_key ON events (key, kind);
    """,
    """
    ALTER TABLE results ADD COLUMN arrays TEXT NOT NULL DEFAULT '';
    CREATE TABLE arrays (seq INTEGER PRIMARY KEY, data BLOB NOT NULL);
    """,
)
"""Step n takes a ledger of schema n to schema n + 1; steps are only ever added."""

# Columns by name: a name that a flipped bit changed is an error of SQLite then.
RESULTS = (
    "SELECT r.seq, r.key, r.record, r.sha256, r.arrays, a.data "
    "FROM results r LEFT JOIN arrays a ON a.seq = r.seq"
)
EVENTS = "SELECT seq, key, kind, data, sha256 FROM events"

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_UNDO = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
"""What SQLite says where it would first have to undo a transaction in a file that it may not write."""
_APPLICATION = 0x50656E6A  # "Penj", where SQLite keeps the kind of its file
_WAIT_S = 60.0


def make_file(path: Path) -> None:
    """Make an empty ledger where there is none, whole at once: SQLite would leave an empty file for a while.

    Several processes may; the first one makes it.
    """
    temporary = path.parent / f".penjing-{secrets.token_hex(8)}.tmp"
    try:
        with contextlib.closing(_connect(str(temporary))) as db:
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            _migrate(db)
        _publish(temporary, path)
    except sqlite3.Error as error:
        raise refusal_of(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(temporary, path)  # a file system without hard links: the last one wins, all are empty


def open_to_write(path: Path) -> sqlite3.Connection:
    """Open a ledger for its driver: all of it is checked, and an older schema is brought up to date.

    Raises:
        Refused: damaged (it is left as it is), foreign, of a newer version, or the disk's reasons.
    """
    db = None
    try:
        db = _connect(str(path))
        check_kind(db, path)
        found = [row[0] for row in db.execute("PRAGMA integrity_check")]
        if found != ["ok"]:
            raise sqlite3.DatabaseError(str(found[0]))
        _migrate(db)
        _check_rows(db)
        return db
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, sqlite3.Error | UnicodeDecodeError | DamagedRow):
            raise refusal_of(error, path) from error
        raise


class ReadOnly:
    """A ledger that is only read, also on a read-only file system, as a context manager.

    Nothing is written beside it either. Where its last writer was killed inside of a transaction, which
    SQLite would first have to undo in the file, a copy is read.

    Attributes:
        db: the connection.
        version: of the schema; an older one is read as it is.

    Raises:
        Refused: missing, damaged, foreign, of a newer version, or the disk's reasons.
    """

    def __init__(self, path: Path) -> None:
        self._cleanup = contextlib.ExitStack()
        try:
            self.db, self.version = self._open(path)
        except BaseException as error:
            self._cleanup.close()
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):
                raise refusal_of(error, path) from error
            raise

    def close(self) -> None:
        """Close the file, and remove the copy if there is one."""
        self._cleanup.close()

    def _open(self, path: Path) -> tuple[sqlite3.Connection, int]:
        try:
            return self._look(f"{path.as_uri()}?mode=ro", path)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _UNDO or not locate_journal(path).is_file():
                raise
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        for source in (path, locate_journal(path)):
            shutil.copyfile(source, folder / source.name)
        return self._look((folder / path.name).as_uri(), path)

    def _look(self, uri: str, path: Path) -> tuple[sqlite3.Connection, int]:
        db = self._cleanup.enter_context(contextlib.closing(_connect(uri)))
        return db, check_kind(db, path)


class DamagedRows:
    """What can still be read of a damaged ledger, row by row.

    Args:
        path: of a copy, since SQLite may write to it.
    """

    def __init__(self, path: Path) -> None:
        self._db: sqlite3.Connection | None = None
        self._most = 0
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            self._db = _connect(str(path))
            known = [set(_own_tables(MIGRATIONS[: n + 1])) for n in range(len(MIGRATIONS))]
            found = set(_tables(self._db))
            version = next((n for n, own in enumerate(known, 1) if found <= own), None)
            if version is not None:  # else a table could be a view, and do anything
                self._db.execute(f"PRAGMA user_version = {version}")
                _migrate(self._db)
                # No row takes less than its hash; a hostile file could name any number.
                self._most = path.stat().st_size // 64

    def results(self) -> Iterator[tuple[Any, ...]]:
        """Yield the results that match their hashes: the columns of `results`, then of `arrays`."""
        for *row, data in self._rows(RESULTS, "r.seq"):
            with contextlib.suppress(DamagedRow):
                check_result(*row)
                check_arrays(row[0], row[4], data or b"")
                yield (*row, data)

    def events(self) -> Iterator[tuple[Any, ...]]:
        """Yield the events that match their hashes."""
        for row in self._rows(EVENTS, "seq"):
            with contextlib.suppress(DamagedRow):
                check_event(*row)
                yield row

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()

    def _rows(self, query: str, seq: str) -> Iterator[tuple[Any, ...]]:
        """Look for one row at a time: a page that cannot be read takes its own rows with it, no others."""
        for number in range(1, self._most + 1):
            assert self._db is not None, "it is open where rows were found to be there"
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                yield from self._db.execute(f"{query} WHERE {seq} = ?", (number,)).fetchall()


def locate_journal(path: Path) -> Path:
    """Return where SQLite keeps what it needs to undo a transaction that was cut short."""
    return path.with_name(f"{path.name}-journal")


def set_aside(path: Path) -> Path:
    """Give a damaged file another name beside it, its journal too; return the name."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.rename(path, kept)
    if locate_journal(path).exists():  # else SQLite would play it back into the next ledger
        os.rename(locate_journal(path), locate_journal(kept))
    return kept


def check_kind(db: sqlite3.Connection, path: Path) -> int:
    """Return the schema of a ledger.

    Raises:
        Refused: another program's file, or of a newer version.
        sqlite3.DatabaseError: the tables are not those that Penjing makes; a view or a computed column
            would run what its author wrote.
    """
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise Refused(
            "must be a ledger that Penjing wrote",
            value="an empty or damaged file, or that of another program",
            place=str(path),
            fix=how_to_repair(path),
        )
    version = _schema(db)
    if version > len(MIGRATIONS):
        from penjing import __version__

        raise Refused(
            f"must have at most schema {len(MIGRATIONS)}, that of penjing {__version__}",
            value=version,
            place=str(path),
            fix="upgrade: pip install -U penjing",
            code=Exit.ENVIRONMENT,
        )
    if _tables(db) != _own_tables(MIGRATIONS[:version]):
        raise sqlite3.DatabaseError("the tables are malformed")
    return version


def refusal_of(error: Exception, path: Path) -> Refused:
    """Return the refusal for an error of SQLite or of a row: damage, or what the disk says."""
    if _is_damage(error):
        return Refused(
            "must be as it was written",
            value=f"a damaged ledger: {error}",
            place=str(path),
            fix=how_to_repair(path),
        )
    return Refused(
        "the ledger must be open to reading and writing",
        value=f"{error} ({free_bytes(path) or 0:,} bytes free)",
        place=str(path),
        fix="free some space, or wait for the other process",
        code=Exit.ENVIRONMENT,
    )


def how_to_repair(path: Path) -> str:
    """Return what to do about a ledger that is missing or damaged."""
    return f"put back a copy, or keep what can be read with `penjing repair {shlex.quote(str(path.parent))}`"


def _connect(place: str) -> sqlite3.Connection:
    uri = place.startswith("file:")
    db = sqlite3.connect(place, timeout=_WAIT_S, isolation_level=None, check_same_thread=False, uri=uri)
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
    db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")  # damage shows in the hash
    try:
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection) -> None:
    """Bring the tables up to date, all at once; another process may have done so meanwhile."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for number in range(_schema(db), len(MIGRATIONS)):
            for statement in MIGRATIONS[number].split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number + 1}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _schema(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _tables(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()


@functools.cache
def _own_tables(migrations: tuple[str, ...]) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for migration in migrations:
            db.executescript(migration)
        return _tables(db)


def _check_rows(db: sqlite3.Connection) -> None:
    for *row, data in db.execute(RESULTS):
        check_result(*row)
        check_arrays(row[0], row[4], data or b"")
    for row in db.execute(EVENTS):
        check_event(*row)


def check_result(seq: int, key: str, text: str, sha256: str, arrays: str) -> None:
    """Compare a result with its hash.

    Raises:
        DamagedRow: they differ.
    """
    strings = all(isinstance(part, str) for part in (key, text, arrays))
    if not strings or sha256 != digest_row(seq, key, text, *([arrays] if arrays else [])):
        raise DamagedRow(f"result {seq} does not match its hash")


def check_arrays(seq: int, arrays: str, data: bytes) -> None:
    """Compare what lies beside a result with its hash.

    Raises:
        DamagedRow: they differ.
    """
    if not isinstance(data, bytes) or arrays != digest_arrays(data):
        raise DamagedRow(f"the arrays of result {seq} do not match their hash")


def check_event(seq: int, key: str, kind: str, text: str, sha256: str) -> None:
    """Compare an event with its hash.

    Raises:
        DamagedRow: they differ.
    """
    strings = all(isinstance(part, str) for part in (key, kind, text))
    if not strings or sha256 != digest_row(seq, key, kind, text):
        raise DamagedRow(f"event {seq} does not match its hash")


def _is_damage(error: Exception) -> bool:
    # Locked, full and unreadable are OperationalError: the file may be sound. SQLite names real damage
    # DatabaseError itself; a schema that lost a table shows as an OperationalError of a query, and a
    # message that quotes damaged text as a UnicodeDecodeError.
    if isinstance(error, UnicodeDecodeError | DamagedRow) or type(error) is sqlite3.DatabaseError:
        return True
    return any(word in str(error) for word in ("no such", "malformed", "too big"))
