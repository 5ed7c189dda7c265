"""Rows of the ledger: a short text that is hashed, and what is long beside it, compressed."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

LONG = 256
"""Lists and flat tables whose JSON has more characters (quantiles, changes of layers, recall of classes) are
kept beside their row."""
MOST_BYTES = 2**28
"""What one row may hold; a hostile ledger could ask for any amount."""

_Path = tuple[str, ...]


class DamagedRow(ValueError):
    """A row is not as it was written; the message says which."""


@dataclass(frozen=True)
class Packed:
    """A record in the form of a row.

    Attributes:
        text: JSON of the record, with null for each long list or table.
        arrays: compressed JSON of these with their places; empty where there are none.
    """

    text: str
    arrays: bytes


def pack_record(record: dict[str, Any]) -> Packed:
    """Return a record as text, with its long lists and tables beside it.

    Raises:
        ValueError: a value is NaN, infinite or no JSON.

    >>> packed = pack_record({"p50": 1.5, "quantiles": [0.25] * 100})
    >>> packed.text
    '{"p50": 1.5, "quantiles": null}'
    >>> unpack_record(packed.text, packed.arrays)["quantiles"][:2]
    [0.25, 0.25]
    """
    beside: list[tuple[_Path, Any]] = []
    short = _without_long(record, (), beside)
    arrays = zlib.compress(_dump(beside).encode()) if beside else b""
    return Packed(_dump(short), arrays)


def unpack_record(text: str, arrays: bytes = b"") -> dict[str, Any]:
    """Return the record of a row; without its arrays, null stands for each of them.

    Raises:
        DamagedRow: the row holds something else, or more than `MOST_BYTES`.
    """
    try:
        record: Any = json.loads(text)
        if not isinstance(record, dict):
            raise DamagedRow("a row holds no record")
        if arrays:
            for path, value in json.loads(_expand(arrays)):
                _put_back(record, path, value)
    except (ValueError, TypeError, KeyError, RecursionError, zlib.error) as error:
        raise DamagedRow(str(error)) from error
    return record


def digest_row(*parts: object) -> str:
    """Return the SHA-256 over the parts of a row, in hexadecimal.

    >>> digest_row(1, "a", "{}")[:8]
    '305be44e'
    """
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def digest_arrays(arrays: bytes) -> str:
    """Return the SHA-256 of what is kept beside a row; nothing for nothing."""
    return hashlib.sha256(arrays).hexdigest() if arrays else ""


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _without_long(value: Any, path: _Path, beside: list[tuple[_Path, Any]]) -> Any:
    nested = isinstance(value, dict) and any(isinstance(part, dict | list | tuple) for part in value.values())
    if isinstance(value, dict) and (nested or not path):
        return {key: _without_long(part, (*path, str(key)), beside) for key, part in value.items()}
    if path and isinstance(value, dict | list | tuple) and len(_dump(value)) > LONG:
        beside.append((path, value))
        return None
    return value


def _put_back(record: dict[str, Any], path: Any, value: Any) -> None:
    *way, last = path
    for name in way:
        record = record[name]
    record[last] = value


def _expand(arrays: bytes) -> bytes:
    machine = zlib.decompressobj()
    data = machine.decompress(arrays, MOST_BYTES)
    if machine.unconsumed_tail:
        raise DamagedRow(f"a row holds more than {MOST_BYTES:,} bytes")
    return data
