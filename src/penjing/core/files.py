"""The one atomic writer: after any crash a path holds its old content or its new one, never a part.

Order of every write: temporary name in the same folder, data, fsync, rename, fsync of the folder. A folder
gets a manifest with the SHA-256 of every file before its rename, and readers check it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from penjing.core.errors import Exit, Refused

MANIFEST = "manifest.json"
SCHEMA = 1
"""Version of the manifest's form; a reader refuses a newer one."""

_PREFIX, _SUFFIX = ".penjing-", ".tmp"
_LARGEST_JSON = 256 * 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}

Build = Callable[[Path], Mapping[str, Any] | None]
Write = Callable[[BinaryIO], None]


def write_bytes(path: Path | str, data: bytes | bytearray | memoryview) -> None:
    """Replace a file's content at once, durably.

    Raises:
        Refused: disk full, quota, no permission, no such folder (environment); the old content stays.
    """
    with _replacing(Path(path)) as temporary:
        _write_new(temporary, memoryview(data).cast("B"))


def write_file(path: Path | str, write: Write) -> None:
    """Replace a file by what a function writes, durably, for content that is not in memory at once.

    Args:
        path: of the file.
        write: is called with a new empty file.

    Raises:
        Refused: as `write_bytes`; the old content stays then, and also where `write` raises.
    """
    with _replacing(Path(path)) as temporary, open(temporary, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file; put it in the place of a path, or delete it after an error."""
    temporary = path.parent / temporary_name()
    with refusing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Replace a file's content by text in UTF-8; raises as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Replace a file's content by JSON, indented, without NaN; raises as `write_bytes`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; duplicate keys and NaN are refused.

    Raises:
        Refused: the file is missing, unreadable, larger than 256 MB or no JSON.
    """
    path = Path(path)
    with refusing(path, "read"):
        if path.stat().st_size > _LARGEST_JSON:
            raise Refused(
                "a JSON file must have at most 256 MB",
                value=path.stat().st_size,
                place=str(path),
                fix="choose the file that Penjing wrote; none comes near this size",
            )
        data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(
            "the file must hold JSON",
            value=error,
            place=str(path),
            fix="the file is damaged or foreign: restore it from a copy",
        ) from error


def write_folder(path: Path | str, build: Build) -> dict[str, Any]:
    """Make a folder with all its files at once; return its manifest.

    Args:
        path: of the new folder; its parent exists.
        build: is called with an empty temporary folder beside it and fills it; the mapping that it
            returns goes into the manifest as `facts`.

    Raises:
        Refused: the path exists, a link was made inside, or the environment's reasons of `write_bytes`.
            Nothing is left behind then.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise Refused(
            "the folder must not exist yet",
            value=str(path),
            place="write",
            fix="choose another folder; nothing is ever overwritten",
            code=Exit.USAGE,
        )
    temporary = path.parent / temporary_name()
    with refusing(path):
        try:
            os.mkdir(temporary)
            return publish_folder(temporary, path, build(temporary) or {})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def publish_folder(made: Path, path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Give a folder that is complete its manifest and its name at once; return the manifest.

    Args:
        made: the folder, on the file system of `path`.
        path: its new name, which is not taken.
        facts: go into the manifest.

    Raises:
        Refused: as `write_folder`; the folder then keeps its old name.
    """
    with refusing(path):
        content = manifest(made, facts)
        write_json(made / MANIFEST, content)
        _sync_tree(made)
        os.rename(made, path)
        _sync_folder(path.parent)
    return content


def make_folder(path: Path | str) -> Path:
    """Make a folder, with those above it, where it is missing; return its absolute path.

    Raises:
        Refused: the path is a file, or cannot be written.
    """
    path = Path(path).expanduser().absolute()
    with refusing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path | str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a folder: every file with its SHA-256 and bytes, and a SHA-256 over the description itself.

    Raises:
        Refused: a link, or something that is neither file nor folder, lies inside.
    """
    from penjing import __version__

    folder = Path(folder)
    files = [
        {"name": name, "sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in _names(folder)
        if name != MANIFEST
    ]
    made = {"schema": SCHEMA, "penjing": __version__, "files": files, "facts": dict(facts)}
    # As it will be read back: keys are strings, tuples are lists.
    content: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    return content | {"sha256": _own_digest(content)}


def verify_manifest(folder: Path | str) -> dict[str, Any]:
    """Check every file of a folder against its manifest, and return the manifest.

    Raises:
        Refused: the manifest is missing, damaged, foreign or of a newer version; or a file is missing,
            damaged, not listed, or a link. The file is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Refused("the folder must exist", value=str(folder), place="open", fix="correct the path")
    content = _read_manifest(folder)
    listed = {entry["name"]: entry for entry in content["files"]}
    present = set(_names(folder)) - {MANIFEST}
    for name in sorted(listed.keys() - present):
        raise Refused(
            "every file of the manifest must be there",
            value=f"{name} is missing",
            place=str(folder),
            fix="restore the folder from a copy, or make it again",
        )
    for name in sorted(present - listed.keys()):
        raise Refused(
            "every file must be listed in the manifest",
            value=f"{name} is foreign",
            place=str(folder),
            fix="remove it if you put it there",
        )
    for name, entry in listed.items():
        with refusing(folder / name, "read"):
            size = (folder / name).stat().st_size
            same = size == entry["bytes"] and sha256_file(folder / name) == entry["sha256"]
        if not same:
            raise Refused(
                "every file must be as it was written",
                value=f"{name} is damaged ({size} bytes, {entry['bytes']} written)",
                place=str(folder),
                fix="restore the folder from a copy, or make it again",
            )
    return content


def remove_leftovers(folder: Path | str) -> list[str]:
    """Remove what a killed writer left under a folder, at any depth; return the names.

    Call it only while no other process writes there (under the driver's lock).
    """
    removed = []
    for parent, folders, files in os.walk(folder):
        for name in filter(is_temporary, (*folders, *files)):
            path = Path(parent) / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
                folders.remove(name)
            else:
                path.unlink(missing_ok=True)
            removed.append(str(path.relative_to(folder)))
    return removed


def free_bytes(path: Path | str) -> int | None:
    """Return the free bytes where a path lies or would lie; None where the system does not say."""
    path = Path(path).absolute()
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


@contextlib.contextmanager
def refusing(path: Path | str, verb: str = "written") -> Iterator[None]:
    """Turn an error of the system into a refusal that names the path and, in writing, the free bytes."""
    try:
        yield
    except OSError as error:
        raise _environment(error, Path(path), verb) from error


def _environment(error: OSError, path: Path, verb: str) -> Refused:
    if error.errno in _FULL:
        rule, fix = "there must be room to write the file", "free some space or raise the quota, then resume"
    elif error.errno in _CLOSED:
        rule, fix = (
            "this user needs permission for the place",
            "choose another folder or change its permissions",
        )
    elif error.errno == errno.EXDEV:
        rule, fix = (
            "a rename must stay on one file system",
            "choose a folder that is no mount point or overlay",
        )
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        rule, fix = "the path and its parent folder must exist", "make the folder, or correct the path"
    else:
        rule, fix = f"the path must be one that can be {verb}", "check the disk and its mount, then try again"
    value = f"{os.strerror(error.errno) if error.errno else error}"
    if verb == "read":
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            rule, fix = "the file must exist", "correct the path"
        return Refused(rule, value=value, place=str(path), fix=fix, code=Exit.ENVIRONMENT)
    free = free_bytes(path)
    room = "free space unknown" if free is None else f"{free:,} bytes free"
    return Refused(rule, value=value, place=f"{path} ({room})", fix=fix, code=Exit.ENVIRONMENT)


def is_temporary(name: str) -> bool:
    """Tell whether a name in a folder is that of something half-made.

    >>> is_temporary(temporary_name()), is_temporary("model.onnx")
    (True, False)
    """
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def temporary_name() -> str:
    """Return a new name that `is_temporary` knows, and whose bearer `remove_leftovers` removes."""
    return f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def _write_new(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        done = 0
        while done < len(data):
            done += os.write(descriptor, data[done : done + 2**26])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of folders; there is no other call to make then.
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(parent))


def _names(folder: Path) -> list[str]:
    names, waiting = [], [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name, mode = prefix + entry.name, entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    waiting.append(name + "/")
                elif stat.S_ISREG(mode):
                    names.append(name)
                else:
                    raise Refused(
                        "the folder must hold only plain files, no links",
                        value=name,
                        place=str(folder),
                        fix="replace it by the file itself",
                    )
    return sorted(names)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise Refused(
            "the folder must have a manifest",
            value=f"no file {MANIFEST}",
            place=str(folder),
            fix="choose a folder that Penjing delivered",
        )
    read = read_json(path)
    content: dict[str, Any] = read if isinstance(read, dict) else {}
    schema = content.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise Refused(
            "the manifest must be Penjing's",
            value=f"schema {schema!r}",
            place=str(path),
            fix="choose a folder that Penjing delivered",
        )
    if schema > SCHEMA:
        raise Refused(
            f"the manifest's schema must be at most {SCHEMA}",
            place=str(path),
            code=Exit.ENVIRONMENT,
            value=f"{schema}, written by penjing {content.get('penjing')}",
            fix="upgrade penjing to the version that wrote it",
        )
    if content.pop("sha256", None) != (own := _own_digest(content)) or not _listed(content):
        raise Refused(
            "every file must be as it was written",
            value=f"{MANIFEST} is damaged",
            place=str(folder),
            fix="restore the folder from a copy, or make it again",
        )
    return content | {"sha256": own}


def _listed(content: dict[str, Any]) -> bool:
    files = content.get("files")
    plain = isinstance(files, list) and all(
        isinstance(entry, dict) and entry.keys() == {"name", "sha256", "bytes"} and inside(entry["name"])
        for entry in files
    )
    return plain and len({entry["name"] for entry in files or ()}) == len(files or ())


def inside(name: Any) -> bool:
    """Tell whether a name stays inside its folder: relative, no `..`, no backslash.

    >>> inside("model.onnx"), inside("../model.onnx"), inside("/etc/passwd")
    (True, False, False)
    """
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    return not name.startswith("/") and all(part not in ("..", ".", "") for part in PurePosixPath(name).parts)


def _own_digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is written twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
