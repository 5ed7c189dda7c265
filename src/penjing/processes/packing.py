"""Hand Python objects to our own child processes through anonymous files that have no name on any disk.

The file holds a pickle and, aligned beside it, the bytes of all arrays (pickle protocol 5, PEP 574). A child
maps the file, so that all children share one copy of the arrays in memory until one writes to its own.
"""

from __future__ import annotations

import inspect
import json
import mmap
import os
import pickle
import sys
import sysconfig
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.machinery import ModuleSpec
from io import BytesIO
from types import CodeType, FunctionType, ModuleType
from typing import IO, Any, ClassVar

from penjing.core.errors import Refused
from penjing.core.files import refusing

FIX = "make that part inside the function that uses it"

_ALIGNMENT = 64
_LONGEST_INDEX = 2**24
_DYNAMIC = "<dynamic-code>"


def pack(value: Any, place: str, fix: str = FIX) -> IO[bytes]:
    """Write a value into an anonymous temporary file, whose descriptor children can inherit.

    Functions and classes from scripts, notebooks and other modules that a child could not import travel by
    value.

    Args:
        value: anything; arrays in it are shared by all children until they write.
        place, fix: what the value is, and what helps where it cannot be sent; for refusals.

    >>> with pack({"x": [1, 2]}, "payload") as file:
    ...     unpack(file.fileno())
    {'x': [1, 2]}

    Raises:
        Refused: a part cannot be pickled (the part is named), or the disk for temporary files is full.
    """
    buffers: list[pickle.PickleBuffer] = []
    with _by_value():
        try:
            head = _dumps(value, buffers)
        except Exception as error:
            raise Refused(
                "cannot be sent to another process",
                value=f"{type(error).__name__}: {error}",
                place=_culprit(place, value),
                fix=fix,
            ) from error
    with refusing(tempfile.gettempdir()):
        file = tempfile.TemporaryFile()  # noqa: SIM115  the caller keeps it for all children
        try:
            _write(file, [memoryview(head), *(buffer.raw() for buffer in buffers)])
        except BaseException:
            file.close()
            raise
    return file


def unpack(descriptor: int) -> Any:
    """Rebuild what `pack` wrote; arrays are copied page by page when they are written to, never before."""
    view = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    index = bytes(view[:_LONGEST_INDEX]).split(b"\n", 1)[0]
    parts, position = [], len(index) + 1
    for length in json.loads(index):
        position += -position % _ALIGNMENT
        parts.append(view[position : position + length])
        position += length
    # Written by our own parent into a file without a name that only its children inherit.
    return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301


def _write(file: IO[bytes], parts: list[memoryview]) -> None:
    index = json.dumps([part.nbytes for part in parts]).encode() + b"\n"
    file.write(index)
    position = len(index)
    for part in parts:
        padding = -position % _ALIGNMENT
        file.write(b"\0" * padding)
        file.write(part)
        position += padding + part.nbytes
    file.flush()


def _dumps(value: Any, buffers: list[pickle.PickleBuffer]) -> bytes:
    file = BytesIO()
    # list.append returns None, by which the pickler leaves a buffer out of the stream.
    _pickler()(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return file.getvalue()


@cache
def _pickler() -> type[Any]:
    """Return cloudpickle's pickler, but for code, which keeps its file's name: tracebacks quote the line."""
    import cloudpickle

    table = cloudpickle.Pickler.dispatch_table
    reduce = {CodeType: partial(_with_its_file, table[CodeType])}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = ChainMap(reduce, table)

    return Pickler


def _with_its_file(reduce: Callable[[CodeType], Any], code: CodeType) -> Any:
    make, parts, *rest = reduce(code)
    return make, tuple(code.co_filename if part == _DYNAMIC else part for part in parts), *rest


def _culprit(name: str, value: Any) -> str:
    """Name the deepest part of a value that cannot be pickled by itself."""
    seen = {id(value)}
    while True:
        for step, part in _parts(value):
            if id(part) not in seen and not _can_pickle(part):
                seen.add(id(part))
                name, value = name + step, part
                break
        else:
            return f"{name} ({type(value).__name__})"


def _can_pickle(value: Any) -> bool:
    try:
        _dumps(value, [])
    except Exception:  # noqa: BLE001  any class may fail to be pickled in its own way
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, FunctionType):
        used = inspect.getclosurevars(value)
        yield from ((f" uses {key}", part) for key, part in {**used.globals, **used.nonlocals}.items())
    elif not isinstance(value, type | ModuleType):
        yield from ((f".{key}", part) for key, part in getattr(value, "__dict__", {}).items())


@contextmanager
def _by_value() -> Iterator[None]:
    """Let cloudpickle carry modules that a child cannot import, for the time of one pickling."""
    import cloudpickle

    before = cloudpickle.list_registry_pickle_by_value()
    modules = [module for module in _unimportable() if module.__name__ not in before]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _unimportable() -> list[ModuleType]:
    installed = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
    specs: dict[str, ModuleSpec | None] = {}
    found = []
    for name, module in list(sys.modules.items()):
        path = vars(module).get("__file__") if isinstance(module, ModuleType) else None
        if not isinstance(path, str) or path.startswith(installed) or module.__name__ != name:
            continue
        top = name.partition(".")[0]
        if top not in specs:
            specs[top] = _find(top)
        if name != "__main__" and not _is_from(path, specs[top]):
            found.append(module)
    return found


def _find(top: str) -> ModuleSpec | None:
    """Find a top-level module as a fresh process would, past `sys.modules`."""
    specs = (finder.find_spec(top, None) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


def _is_from(path: str, spec: ModuleSpec | None) -> bool:
    if spec is None:
        return False
    if spec.submodule_search_locations is not None:
        real = os.path.realpath(path)
        return any(real.startswith(os.path.realpath(p) + os.sep) for p in spec.submodule_search_locations)
    return spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(path)
