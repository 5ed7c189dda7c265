"""Digests of what callables and settings contain, so that a change of them is noticed.

A function counts by its bytecode, constants, defaults, what it closes over, and the user's own functions and
values that it refers to; an object by its class and state. What belongs to an installed package counts by
its name and the package's version.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from penjing.core.value import Value

MOST_PARTS = 20_000
"""Parts of one value that are looked at; more than that are not told apart."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_NO_CONTENT = frozenset(
    ("__module__", "__qualname__", "__doc__", "__slots__", "__firstlineno__", "__static_attributes__")
)
_CALL_FLAGS = 0xFF  # of a code object: how it is called, without what its documentation sets
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class Content(Value):
    """What a value contains.

    Attributes:
        name: of a callable, or the value itself where it is short.
        sha256: of its content.
        unknown: types of parts that could not be read, whose changes are not noticed.
    """

    name: str
    sha256: str
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.sha256[:12]})"


def digest_content(value: Any) -> Content:
    """Return a digest of a value's content: equal in every process of one version of Python.

    Args:
        value: plain data, arrays, tensors, functions, objects, or containers of them.

    >>> first, same, other = {"k": 5, "beta": 2.0}, {"beta": 2.0, "k": 5}, {"k": 10, "beta": 2.0}
    >>> a, b, c = (digest_content(settings).sha256 for settings in (first, same, other))
    >>> a == b, a == c
    (True, False)
    """
    walk = _Walk()
    walk.visit(value)
    return Content(name=_name(value), sha256=walk.hash.hexdigest(), unknown=tuple(sorted(walk.unknown)))


def _name(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)[:60]
    named = value if isinstance(value, FunctionType | BuiltinFunctionType | type) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


class _Walk:
    """Feeds a hash with the parts of a value, each object once."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256(f"python {platform.python_version_tuple()[:2]}".encode())
        self.unknown: set[str] = set()
        self._seen: dict[int, tuple[int, Any]] = {}  # the object is kept, so that no id is used twice

    def put(self, *parts: object) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self.hash.update(len(data).to_bytes(8, "big") + data)

    def visit(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            return self.put(type(value).__name__, repr(value))
        if id(value) in self._seen:
            return self.put("seen", self._seen[id(value)][0])
        if len(self._seen) >= MOST_PARTS:
            self.unknown.add(f"more than {MOST_PARTS} parts")
            return None
        self._seen[id(value)] = (len(self._seen), value)
        return self._visit_new(value)

    def _visit_new(self, value: Any) -> None:
        if isinstance(value, Enum):
            self.put("enum", _name(type(value)), value.name)
        elif isinstance(value, np.ndarray | np.generic):
            self._array(np.asarray(value))
        elif isinstance(value, Mapping):
            self.put("mapping", len(value))
            for key in sorted(value, key=_order):  # keys in any order count alike
                self.visit(key)
                self.visit(value[key])
        elif isinstance(value, set | frozenset):
            self.put("set", len(value), *sorted(map(_order, value)))
        elif isinstance(value, list | tuple):
            self.put(type(value).__name__, len(value))
            for item in value:
                self.visit(item)
        else:
            self._callable_or_object(value)

    def _callable_or_object(self, value: Any) -> None:
        if isinstance(value, ModuleType):
            self.put("module", value.__name__, _version(value.__name__))
        elif isinstance(value, functools.partial):
            self.put("partial")
            self.visit([value.func, list(value.args), dict(value.keywords)])
        elif isinstance(value, MethodType):
            self.put("method")
            self.visit([value.__func__, value.__self__])
        elif isinstance(value, classmethod | staticmethod):
            self.visit([type(value).__name__, value.__func__])
        elif isinstance(value, property):
            self.visit(["property", value.fget, value.fset])
        elif isinstance(value, FunctionType | BuiltinFunctionType | type):
            self._named(value)
        elif isinstance(value, CodeType):
            self._code(value)
        elif callable(getattr(value, "detach", None)) and hasattr(value, "dtype"):
            self._tensor(value)
        else:
            self._object(value)

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        self.put("array", array.dtype.str, array.shape)
        if array.dtype.hasobject:
            self.visit(array.tolist())
        else:
            self.put(np.ascontiguousarray(array).tobytes())

    def _tensor(self, tensor: Any) -> None:
        self.put("tensor", tensor.dtype, tuple(tensor.shape))
        self._array(tensor.detach().cpu().double().numpy())

    def _named(self, value: Any) -> None:
        """A function or class: by name and version where a package has it, else by what it does."""
        self.put(type(value).__name__)
        module = getattr(value, "__module__", None) or "builtins"
        if isinstance(value, BuiltinFunctionType) or _is_library(module):
            self.put(module, value.__qualname__, _version(module))
        elif isinstance(value, type):
            own = {name: part for name, part in vars(value).items() if _defines(name, part)}
            self.visit([own, [base for base in value.__bases__ if base is not object]])
        else:
            self._function(value)

    def _function(self, function: FunctionType) -> None:
        self._code(function.__code__, function.__doc__)
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        self.visit([function.__defaults__, function.__kwdefaults__, cells])
        names = sorted(set(_names(function.__code__)))
        for name in names:
            if name in function.__globals__:
                self.put(name)
                self._global(function.__globals__[name], names)

    def _global(self, value: Any, names: list[str]) -> None:
        self.visit(value)
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            for name in names:  # attributes of the user's own modules, such as helpers.score
                if name in vars(value):
                    self.put(name)
                    self.visit(vars(value)[name])

    def _code(self, code: CodeType, documentation: str | None = None) -> None:
        self.put("code", code.co_code, code.co_names, code.co_freevars, code.co_argcount)
        self.put(code.co_flags & _CALL_FLAGS)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self.visit(None if constant == documentation else constant)

    def _object(self, value: Any) -> None:
        self.visit(type(value))
        slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
        if not hasattr(value, "__dict__") and not slots:
            self.unknown.add(_name(type(value)))
            return
        self.visit(dict(vars(value)) if hasattr(value, "__dict__") else {})
        self.visit([[name, getattr(value, name)] for name in slots])


def _order(key: Any) -> tuple[str, str]:
    plain = isinstance(key, _PLAIN) or (isinstance(key, tuple) and all(isinstance(x, _PLAIN) for x in key))
    return type(key).__name__, repr(key) if plain else ""


def _defines(name: str, part: Any) -> bool:
    kinds = (FunctionType, property, classmethod, staticmethod, list, tuple, dict, np.ndarray, *_PLAIN)
    return isinstance(part, kinds) and name not in _NO_CONTENT


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@functools.cache
def _is_library(module: str) -> bool:
    """Tell whether a module came with Python or with an installed package."""
    top = module.partition(".")[0]
    if top in sys.builtin_module_names or top in sys.stdlib_module_names or top == "penjing":
        return top != "__main__"
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and file.startswith(_LIBRARIES)


def _version(module: str) -> str:
    top = module.partition(".")[0]
    return str(getattr(sys.modules.get(top), "__version__", "")) if _is_library(module) else ""
