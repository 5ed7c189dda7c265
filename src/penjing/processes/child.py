"""One child process in a session of its own: its messages, its output, its memory, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from penjing.core.errors import Exit, Refused
from penjing.core.files import refusing

_ENTRY = "penjing.processes.entry"
_CHUNK = 2**16
_HEAD = 2**20
_TAIL = 2**16

_SENDING_S = 5.0
"""Longest time for a request to go into the buffer of a child that does not read."""

_REAPING_S = 2.0
"""Time for the supervisor to kill and reap the job, before all are killed from here."""


class Output:
    """What a process prints: the first megabyte goes into a file as it comes, the last 64 kB at the end.

    A file that exists is continued: the log of an earlier attempt may tell why there is another one.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._written = 0
        self._dropped = 0
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        if path is not None:
            with refusing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

    def add(self, chunk: bytes) -> None:
        """Take the next bytes."""
        head = chunk[: max(0, _HEAD - self._written)]
        self._append(head)
        self._written += len(head)
        self._dropped += len(chunk) - len(head)
        self._tail.append(chunk)
        self._tail_bytes += len(chunk)
        while self._tail_bytes - len(self._tail[0]) >= _TAIL:
            self._tail_bytes -= len(self._tail.popleft())

    def tail(self, lines: int) -> str:
        """Return the last lines."""
        text = b"".join(self._tail).decode("utf-8", "replace")
        return "\n".join(text.strip().splitlines()[-lines:])

    def close(self) -> None:
        """Write what is left, and how much was not kept."""
        last = b"".join(self._tail)[-min(_TAIL, self._dropped) :] if self._dropped else b""
        if last:
            self._append(f"\n... {self._dropped - len(last)} bytes not kept ...\n".encode() + last)

    def _append(self, data: bytes) -> None:
        if self.path is not None and data:
            with refusing(self.path), open(self.path, "ab") as file:
                file.write(data)


class Child:
    """A process in a session of its own that runs `function(payload, channel, *args)`.

    It is joined to this one by a socket for messages (lines of JSON), a pipe for what it prints, and a life
    line: where that breaks, the process ends with its whole family.

    Args:
        payload: the packed payload, an open file that many children may share.
        call: the packed `(function, args)`.
        environment: variables added to the driver's own.
        output: keeps what is printed.

    Raises:
        Refused: the process cannot be started.
    """

    def __init__(
        self, payload: IO[bytes], call: IO[bytes], environment: Mapping[str, str], output: Output
    ) -> None:
        self.output = output
        self._code: int | None = None
        self._partial = b""
        self._known: dict[int, psutil.Process] = {}
        with refusing(sys.executable, "started"):
            life, self._life = os.pipe()
            try:
                self._socket, theirs = socket.socketpair()
            except BaseException:
                os.close(life)
                os.close(self._life)
                raise
        try:
            self._process = _start(
                (theirs.fileno(), life, payload.fileno(), call.fileno()), _environment(environment)
            )
        except BaseException:
            self._socket.close()
            os.close(self._life)
            raise
        finally:
            theirs.close()
            os.close(life)
        self._socket.settimeout(_SENDING_S)
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self._printed = self._process.stdout.fileno()
        os.set_blocking(self._printed, False)
        self._selector = selectors.PollSelector()
        for descriptor in (self._socket.fileno(), self._printed):
            self._selector.register(descriptor, selectors.EVENT_READ)

    def send(self, request: dict[str, Any]) -> None:
        """Send a request, a short line; one that dies or does not listen is noticed by who waits."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(request).encode() + b"\n")

    def messages(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Wait at most `timeout` seconds, collect output, and yield the replies that have come."""
        if self._selector.get_map():
            ready = {key.fd for key, _ in self._selector.select(timeout)}
        else:
            ready = set()
            time.sleep(min(timeout, 0.01))
        for chunk in self._read(self._printed, ready):
            self.output.add(chunk)
        for chunk in self._read(self._socket.fileno(), ready):
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):  # a line cut off by the job's death
                    yield json.loads(line)

    def exited(self) -> bool:
        """Tell whether the process has ended; it stays a zombie, so that its group's number stays its own."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self._process.returncode is not None or os.waitid(os.P_PID, self.pid, flags) is not None

    def memory(self) -> int:
        """Return the resident bytes of the process and all its descendants.

        Pages that several of them share are counted once for each by the fast count.
        """
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def own_memory(self) -> int:
        """Return the resident bytes with shared pages divided among those who share; slower than `memory`."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                full = process.memory_full_info()
                total += getattr(full, "pss", full.uss)
        return total

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._code is not None

    def end(self, grace_s: float) -> int:
        """End the process with its whole family, after `grace_s` seconds of notice; return the exit code.

        A KeyboardInterrupt meanwhile cuts the notice short, and is raised again when all is ended. Ending
        twice does nothing.
        """
        if self._code is not None:
            return self._code
        try:
            self._family()
            if grace_s and not self.exited():
                self._signal_group(signal.SIGTERM)
                self._wait(grace_s)
            with contextlib.suppress(OSError):  # it has ended
                os.write(self._life, b".")
            self._wait(_REAPING_S)
        finally:
            self._family()
            self._signal_group(signal.SIGKILL)
            for process in self._known.values():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._code = self._process.wait()
            self._close()
        return self._code

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.exited() and time.monotonic() < deadline:
            for _ in self.messages(0.05):
                pass

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            leader = psutil.Process(self.pid)
            for process in [leader, *leader.children(recursive=True)]:
                self._known.setdefault(process.pid, process)
        return list(self._known.values())

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for zombies alone
            os.killpg(self.pid, number)

    def _read(self, descriptor: int, ready: set[int]) -> Iterator[bytes]:
        while descriptor in ready:
            try:
                chunk = os.read(descriptor, _CHUNK)
            except BlockingIOError:
                return
            except ConnectionError:  # it ended with a request unread
                chunk = b""
            if not chunk:
                self._selector.unregister(descriptor)
                return
            yield chunk

    def _close(self) -> None:
        self._selector.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._socket.close()
        os.close(self._life)


def _start(descriptors: tuple[int, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise Refused(
            "Python must be able to start itself",
            value="sys.executable is empty",
            place=_ENTRY,
            fix="start the program with the interpreter itself, as in `python program.py`",
            code=Exit.ENVIRONMENT,
        )
    with refusing(sys.executable, "started"):
        # -P: a file of the user in the current folder must not stand in for a library's module.
        return subprocess.Popen(
            [sys.executable, "-P", "-u", "-X", "faulthandler", "-m", _ENTRY, *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            start_new_session=True,
            env=environment,
        )


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the driver's variables, its module path, and a hash seed, so that sets keep their order."""
    path = [os.getcwd() if entry == "" else entry for entry in sys.path if os.pathsep not in entry]
    return {"PYTHONHASHSEED": "0", **os.environ, "PYTHONPATH": os.pathsep.join(path), **more}
