"""One child process in a session of its own: its replies, its output, its memory, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from penjing.core.errors import Exit, Refused
from penjing.core.files import refusing

_CHUNK = 2**16
_HEAD = 2**20
_TAIL = 2**16


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
    """A Python module run in a process group of its own, with two pipes: replies from it, and its life line.

    Args:
        module: run as `python -m MODULE DESCRIPTORS... REPLY LIFE`.
        descriptors: passed on to it, first.
        environment: variables added to the driver's own.

    Raises:
        Refused: the process cannot be started.
    """

    def __init__(
        self, module: str, descriptors: tuple[int, ...], environment: Mapping[str, str], output: Output
    ) -> None:
        if not sys.executable:
            raise Refused(
                "Python can start itself",
                value="sys.executable is empty",
                place=module,
                fix="run with in_process=True",
                code=Exit.ENVIRONMENT,
            )
        self.output = output
        self._replies, reply = os.pipe()
        life, self._life = os.pipe()
        passed = (*descriptors, reply, life)
        try:
            with refusing(sys.executable, "started"):
                # -P: a file of the user in the current folder must not stand in for a library's module.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-u", "-X", "faulthandler", "-m", module, *map(str, passed)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=passed,
                    start_new_session=True,
                    env=_environment(environment),
                )
        except BaseException:
            os.close(self._replies)
            os.close(self._life)
            raise
        finally:
            os.close(reply)
            os.close(life)
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self._printed = self._process.stdout.fileno()
        self._partial = b""
        self._known: dict[int, psutil.Process] = {}
        self._selector = selectors.DefaultSelector()
        for descriptor in (self._replies, self._printed):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)

    def messages(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Wait at most `timeout` seconds, collect output, and yield the replies that have come."""
        if self._selector.get_map():
            ready = {key.fd for key, _ in self._selector.select(timeout)}
        else:
            ready = set()
            time.sleep(min(timeout, 0.01))
        for chunk in self._read(self._printed, ready):
            self.output.add(chunk)
        for chunk in self._read(self._replies, ready):
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

    def end(self, grace_s: float) -> int:
        """End the process with its whole group, after `grace_s` seconds of notice; return the exit code.

        A KeyboardInterrupt meanwhile cuts the notice short, and is raised again when all is ended.
        """
        try:
            if not self.exited():
                self._family()
                self._signal_group(signal.SIGTERM)
                deadline = time.monotonic() + grace_s
                while not self.exited() and time.monotonic() < deadline:
                    for _ in self.messages(0.05):
                        pass
        finally:
            self._family()
            self._signal_group(signal.SIGKILL)
            for process in self._known.values():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            code = self._process.wait()
            self._close()
        return code

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
            if not chunk:
                self._selector.unregister(descriptor)
                return
            yield chunk

    def _close(self) -> None:
        self._selector.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        os.close(self._replies)
        os.close(self._life)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the driver's variables, its module path, and a hash seed, so that sets keep their order."""
    path = [os.getcwd() if entry == "" else entry for entry in sys.path if os.pathsep not in entry]
    return {"PYTHONHASHSEED": "0", **os.environ, "PYTHONPATH": os.pathsep.join(path), **more}
