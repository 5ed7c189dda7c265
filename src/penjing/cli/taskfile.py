"""Load a task file: the user's own Python with `model()` and `task()`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from penjing.core.errors import Exit, Refused
from penjing.core.files import refusing
from penjing.core.task import Task


@dataclass(frozen=True)
class TaskFile:
    """What a task file offers: the path, the SHA-256 of its content, `model` and `task`."""

    path: Path
    sha256: str
    module: ModuleType
    model: Callable[[], Any]
    task: Callable[[], Task]


def load_task_file(path: Path, announce: Callable[[str], None] | None = None) -> TaskFile:
    """Import a task file and check that it has `model()` and `task()`.

    The module is pickled by value for the worker processes, so that they need not import it. The file is read
    once: what was hashed is what runs.

    Args:
        path: of the file.
        announce: called with path and hash before the file runs, where the user did not name it.

    Raises:
        Refused: no such file, not Python, an exception while importing, a missing function.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise Refused(
            "must exist",
            value=str(path),
            place="the task file",
            fix="give the path of a Python file with model() and task()",
            code=Exit.USAGE,
        )
    if path.suffix != ".py":
        raise Refused(
            "must be Python source",
            value=path.name,
            place="the task file",
            fix="give a .py file; models are never loaded from pickles",
            code=Exit.USAGE,
        )
    with refusing(path, "read"):
        source = path.read_bytes()
    sha256 = hashlib.sha256(source).hexdigest()
    if announce is not None:
        announce(f"running {path}, sha256 {sha256}")
    module = _import(path, source)
    for name in ("model", "task"):
        if not callable(getattr(module, name, None)):
            raise Refused(
                f"needs a function {name}()",
                place=str(path),
                fix=f"define def {name}(): ... at the top level",
                code=Exit.USAGE,
            )
    return TaskFile(path, sha256, module, module.model, module.task)


def _import(path: Path, source: bytes) -> ModuleType:
    import cloudpickle

    name = f"penjing_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        # Not by the loader, which would take compiled code from a file that nobody was shown.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except Refused:
        raise
    except (Exception, SystemExit) as error:
        line = _line(error, path)
        raise Refused(
            "cannot be imported",
            value=f"{type(error).__name__}: {error}",
            place=f"{path}{line}",
            fix=f"run python {path.name} to see the whole traceback",
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    cloudpickle.register_pickle_by_value(module)
    return module


def call(function: Callable[[], Any], file: TaskFile) -> Any:
    """Call `model()` or `task()` of a task file; an exception becomes a refusal with its line."""
    try:
        value = function()
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            f"{function.__name__}() must return without an exception",
            value=f"{type(error).__name__}: {error}",
            place=f"{file.path}{_line(error, file.path)}",
            fix=f"call {function.__name__}() in python to see the whole traceback",
        ) from error
    if function.__name__ == "task" and not isinstance(value, Task):
        raise Refused(
            "task() must return a penjing.Task",
            value=type(value).__name__,
            place=str(file.path),
            fix="end it with return pj.Task(train=..., valid=..., test=...)",
        )
    if value is None:
        raise Refused(
            f"{function.__name__}() must return a value",
            value="nothing",
            place=str(file.path),
            fix=f"end {function.__name__}() with a return",
        )
    return value


def _line(error: BaseException, path: Path) -> str:
    number = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            number = trace.tb_lineno
        trace = trace.tb_next
    return "" if number is None else f":{number}"
