"""One driver per run directory: a lock of the kernel, with the owner's name in the file.

The lock is `flock`'s. It belongs to the opened file, so that nothing else in the driver's own process frees
it: not a listener that reads the folder, not a backup. POSIX record locks are freed when *any* descriptor of
the file is closed.

On NFS, Linux turns `flock` into a lock at the server, which excludes drivers on other machines if the
server keeps locks (NFSv4, or v3 with lockd; not with the mount option `nolock`). Where it does not, each
machine sees its own locks only: keep run directories on a local disk then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from penjing.core.errors import Exit, Refused
from penjing.core.files import refusing
from penjing.core.value import Value

_BUSY = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_PLAIN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""A link would have the name written to another file, and a pipe would be waited for."""
_TRIES, _PAUSE_S = 5, 0.02
"""Whoever asks for the owner holds a shared lock for a moment, which must not turn a driver away."""

_HELD: set[int] = set()
"""Descriptors of the locks that this process holds."""


class Owner(Value):
    """The process that drives a run.

    >>> print(Owner(pid=7, host="here"))
    pid=7 host='here'
    """

    pid: int
    host: str


class DriverLock:
    """Holds a run directory for one driver, as a context manager.

    The kernel frees the lock when its process dies, however it dies, so that a dead driver's lock is
    never in the way and a process that took over its PID is not mistaken for it. Children that the
    driver forks do not keep it.

    Raises:
        Refused: on entering, when a process drives the run already (this one too); it is named by PID and
            host. Or the file system has no locks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, DriverLock(f"{folder}/driver.lock") as lock:
    ...     find_owner(lock.path).pid == os.getpid()
    True
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._descriptor: int | None = None

    def __enter__(self) -> DriverLock:
        with refusing(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _PLAIN, 0o666)
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
        _HELD.add(descriptor)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        descriptor, self._descriptor = self._descriptor, None
        assert descriptor is not None, "the lock is left once, after it was entered"
        if descriptor in _HELD:  # not in a child that was forked inside
            _HELD.remove(descriptor)
            with contextlib.suppress(OSError):  # the name is for people: a full or lost disk may keep it
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _let_go() -> None:
    """Close, in a forked child, what its parent holds; the lock itself stays the parent's."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)


def find_owner(path: Path | str) -> Owner | None:
    """Return the live process that holds a lock, or None; nothing is written.

    Raises:
        Refused: the file cannot be read.

    >>> print(find_owner("no/such/file"))
    None
    """
    with refusing(path, "read"):
        try:
            descriptor = os.open(path, os.O_RDONLY | _PLAIN)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            if error.errno not in _BUSY:
                raise
            return _read_name(descriptor)
        finally:
            os.close(descriptor)
    return None


def _take(descriptor: int, path: Path) -> None:
    for number in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise Refused(
                    "needs a file system that can lock files",
                    value=os.strerror(error.errno),
                    place=str(path),
                    fix="put the run directory on a local disk",
                    code=Exit.ENVIRONMENT,
                ) from error
            if error.errno not in _BUSY:
                raise
        if number < _TRIES - 1:
            time.sleep(_PAUSE_S)
    raise _busy(_read_name(descriptor), path)


def _read_name(descriptor: int) -> Owner:
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
