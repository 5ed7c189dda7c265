"""What one run found out and the next may reuse, as small files in the user's cache folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.core.errors import Refused
from penjing.core.files import read_json, refusing, write_json
from penjing.core.plan import digest

SCHEMA = 1
"""Version of a file's form; files of another are not used."""


def cache_folder() -> Path:
    """Return the folder for what can be found out again: `PENJING_CACHE`, or `~/.cache/penjing`."""
    return Path(os.environ.get("PENJING_CACHE") or "~/.cache/penjing").expanduser().absolute()


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


def contents() -> dict[str, Any]:
    """Return where the cache is, and how many files and bytes of each kind it holds, as plain data."""
    folder = cache_folder()
    kinds: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*/*.json")):
        entry = kinds.setdefault(path.parent.name, {"files": 0, "bytes": 0})
        entry["files"] += 1
        entry["bytes"] += path.stat().st_size
    return {"folder": str(folder), "kinds": kinds}


def _path(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{key}.json"
