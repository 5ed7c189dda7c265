"""What one run found out and the next may reuse, as small files in the user's cache folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused
from penjing.core.files import read_json, refusing, sha256_file, write_file, write_json
from penjing.core.plan import digest

SCHEMA = 1
"""Version of a file's form; files of another are not used."""


def cache_folder() -> Path:
    """Return the folder for what can be found out again: `PENJING_CACHE`, or `~/.cache/penjing`."""
    return Path(os.environ.get("PENJING_CACHE") or "~/.cache/penjing").expanduser().absolute()


ARRAY_BYTES = 1 << 30
"""Arrays of a kind take at most so much; the oldest go first."""


@dataclass(frozen=True)
class CachedArray:
    """What the cache has for a key: `array`, mapped into memory (what is written to it does not reach the
    file), or None; `note` says what was wrong.
    """

    array: NDArray[Any] | None
    note: str = ""


@dataclass(frozen=True)
class Cached:
    """What the cache has for a key: `content`, None where there is none; `note` says what was wrong."""

    content: dict[str, Any] | None
    note: str = ""


def recall(kind: str, key: str) -> Cached:
    """Return what was kept under a key.

    A file that is damaged, of another form or cannot be read counts as missing; the note names it.

    Args:
        kind: of content; names a folder of the cache.
        key: in hexadecimal.
    """
    path = _path(kind, key)
    if not path.exists():
        return Cached(None)
    try:
        file = read_json(path)
    except Refused as refusal:
        return Cached(None, f"the cache file {path.name} was not used: {refusal.rule}")
    if not isinstance(file, dict) or file.get("schema") != SCHEMA or file.get("key") != key:
        return Cached(None, f"the cache file {path.name} was not used: it is of another form")
    content = file.get("content")
    if not isinstance(content, dict) or file.get("sha256") != digest(content):
        return Cached(None, f"the cache file {path.name} was not used: it does not match its hash")
    return Cached(content)


def keep(kind: str, key: str, content: dict[str, Any]) -> str:
    """Keep plain data under a key, at once or not at all; return why not, or nothing.

    A cache that cannot be written costs time later and nothing else, so it is no error.
    """
    path = _path(kind, key)
    file = {"schema": SCHEMA, "key": key, "sha256": digest(content), "content": content}
    try:
        with refusing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, file)
    except Refused as refusal:
        return f"nothing was cached: {refusal}"
    return ""


def recall_array(kind: str, key: str) -> CachedArray:
    """Return the array that was kept under a key; one that is damaged counts as missing, as in `recall`."""
    path, known = _path(kind, key, "npy"), recall(kind, key)
    if known.content is None or not path.exists():
        return CachedArray(None, known.note)
    try:
        if sha256_file(path) != known.content.get("sha256"):
            return CachedArray(None, f"the cache file {path.name} was not used: it does not match its hash")
        return CachedArray(np.load(path, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError) as error:
        return CachedArray(None, f"the cache file {path.name} was not used: {error}")


def keep_array(kind: str, key: str, array: NDArray[Any]) -> str:
    """Keep an array under a key, at once or not at all; return why not, or nothing.

    Older arrays of the kind are removed where all would take more than `ARRAY_BYTES`.
    """
    path = _path(kind, key, "npy")
    try:
        with refusing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: np.lib.format.write_array(file, array, allow_pickle=False))
        _make_room(path)
        return keep(kind, key, {"sha256": sha256_file(path)})
    except Refused as refusal:
        return f"nothing was cached: {refusal}"
    except OSError as error:
        return f"nothing was cached: {error}"


def _make_room(newest: Path) -> None:
    """Remove the oldest arrays beside one, until all fit."""
    files = sorted(newest.parent.glob("*.npy"), key=lambda path: (path == newest, path.stat().st_mtime))
    total = sum(path.stat().st_size for path in files)
    for path in files[:-1]:
        if total <= ARRAY_BYTES:
            break
        total -= path.stat().st_size
        for part in (path.with_suffix(".json"), path):
            with contextlib.suppress(FileNotFoundError):
                part.unlink()


def describe_cache() -> dict[str, Any]:
    """Return where the cache is, and how many files and bytes of each kind it holds, as plain data."""
    folder = cache_folder()
    kinds: dict[str, dict[str, int]] = {}
    for path in sorted([*folder.glob("*/*.json"), *folder.glob("*/*.npy")]):
        entry = kinds.setdefault(path.parent.name, {"files": 0, "bytes": 0})
        entry["files"] += 1
        entry["bytes"] += path.stat().st_size
    return {"folder": str(folder), "kinds": kinds}


def _path(kind: str, key: str, form: str = "json") -> Path:
    return cache_folder() / kind / f"{key}.{form}"
