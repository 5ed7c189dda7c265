"""One driver per run directory: a lock of the kernel, with the owner's name in the file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from penjing.core.errors import Exit, Refused
from penjing.core.files import refusing
from penjing.core.value import Value

_HELD: set[str] = set()
_BUSY = {errno.EAGAIN, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class Owner(Value):
    """The process that drives a run."""

    pid: int
    host: str


class DriverLock:
    """Holds a run directory for one driver, as a context manager.

    The kernel frees the lock when its process dies, however it dies, so that a dead driver's lock is
    never in the way and a process that took over its PID is not mistaken for it. Children that the
    driver forks do not inherit it.

    Raises:
        Refused: on entering, when another process drives the run; it is named by PID and host.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._descriptor: int | None = None

    def __enter__(self) -> DriverLock:
        key = os.path.realpath(self.path)
        # A POSIX lock does not hold against its own process, and closing any other descriptor of the
        # file would free it: so this process must not even open the file twice.
        if key in _HELD:
            raise _busy(Owner(pid=os.getpid(), host=socket.gethostname()), self.path)
        with refusing(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor, self.path)
            owner = Owner(pid=os.getpid(), host=socket.gethostname())
            with refusing(self.path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner.model_dump_json().encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _HELD.add(key)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._descriptor is not None, "the lock is left once, after it was entered"
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None
        _HELD.discard(os.path.realpath(self.path))


def find_owner(path: Path | str) -> Owner | None:
    """Return the live process that holds a lock, or None."""
    if os.path.realpath(path) in _HELD:
        return Owner(pid=os.getpid(), host=socket.gethostname())
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        os.lockf(descriptor, os.F_TEST, 0)
    except OSError as error:
        if error.errno not in _BUSY:
            raise
        return _named(descriptor)
    finally:
        os.close(descriptor)
    return None


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise _busy(_named(descriptor), path) from None
        if error.errno in _NO_LOCKS:
            raise Refused(
                "needs a file system that can lock files",
                value=os.strerror(error.errno),
                place=str(path),
                fix="put the run directory on a local disk",
                code=Exit.ENVIRONMENT,
            ) from error
        raise


def _named(descriptor: int) -> Owner:
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return Owner(pid=0, host="unknown")  # the owner has the lock but has not written its name yet


def _busy(owner: Owner, path: Path) -> Refused:
    return Refused(
        "must be driven by one process only",
        value=f"PID {owner.pid} on {owner.host}",
        place=str(path.parent),
        fix="wait for it, end it, or choose another folder with --out",
        code=Exit.ENVIRONMENT,
    )
