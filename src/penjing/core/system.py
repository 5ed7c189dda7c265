"""Faults of the machine, told apart from those of the work that met them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

NAMES = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE", "EIO", "ESTALE")
"""Errors of the system that more room, a permission or a repair mends, and no other candidate."""

_BY_NUMBER = {getattr(errno, name): name for name in NAMES}
_BY_WORDS = {os.strerror(number): name for number, name in _BY_NUMBER.items()}


def system_fault(error: BaseException) -> str:
    """Return the name of the system's error that an exception comes from; nothing where there is none.

    Looked at are the exception, its causes and what was handled when it was raised. Libraries that raise
    exceptions of their own are known by the system's words in their messages.

    Args:
        error: any exception.

    >>> system_fault(OSError(errno.ENOSPC, "No space left on device"))
    'ENOSPC'
    >>> system_fault(ValueError("no such channel"))
    ''
    """
    return next(filter(None, map(_own_fault, _chain(error))), "")


def system_error(name: str) -> OSError:
    """Return an exception that `system_fault` finds the name in, for one that crossed a process.

    >>> system_fault(system_error("EMFILE"))
    'EMFILE'
    """
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _own_fault(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_NUMBER.get(error.errno, "")
    text = str(error)
    return next((name for words, name in _BY_WORDS.items() if words in text), "")
