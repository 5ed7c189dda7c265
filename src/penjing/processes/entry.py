"""What a child process runs: a small supervisor and, forked from it, the function that was sent.

Started as `python -m penjing.processes.entry SOCKET LIFE PAYLOAD CALL`, with four inherited descriptors. The
supervisor never runs the user's code, so nothing there can hang it. It reports how the function's process
ended (signal or exit code, largest memory), and ends it when it is told to or when the driver is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import sys
import threading
from typing import Any, NoReturn

from penjing.core.errors import Refused
from penjing.processes.channel import Channel, Message, attempt
from penjing.processes.packing import unpack

_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """Run `function(payload, channel, *args)`; the call holds `(function, args)`."""
    socket, life, payload, call = (int(text) for text in sys.argv[1:5])
    for descriptor in (socket, life, payload, call):
        os.set_inheritable(descriptor, False)
    driver, supervisor = os.getppid(), os.getpid()
    job = os.fork()
    if job == 0:
        os.close(life)
        _die_with(supervisor)
        _work(payload, call, Channel(socket))
    _supervise(job, driver, Channel(socket), life)


def _supervise(job: int, driver: int, channel: Channel, life: int) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(driver, life, job), daemon=True).start()
    _, status, usage = os.wait4(job, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with contextlib.suppress(OSError):  # the driver is gone
        # The job may have died within a line, which the first line break ends.
        os.write(channel.descriptor, b"\n")
        channel.send({"ended": os.waitstatus_to_exitcode(status), "peak_bytes": peak})
    os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _end_with(driver: int, life: int, job: int) -> None:
    """Kill the job when the driver says so or is no more; a fork of it may hold its end of the pipe."""
    while os.getppid() == driver:
        if select.select([life], [], [], 1.0)[0]:
            break
    with contextlib.suppress(ProcessLookupError):
        os.kill(job, signal.SIGKILL)


def _die_with(supervisor: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:  # it died before the line above
        os._exit(1)


def _work(payload: int, call: int, channel: Channel) -> NoReturn:
    """Run the function; leave at once, so that a hook that hangs at exit cannot hold a finished result."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        channel.send(_outcome(payload, call, channel))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed by the function
                stream.flush()
    finally:
        os._exit(0)


def _outcome(payload: int, call: int, channel: Channel) -> Message:
    try:
        return attempt(lambda: _called(payload, call, channel))
    except KeyboardInterrupt:
        return {"status": "crashed", "reason": "interrupted by a signal from outside (SIGINT)"}


def _called(payload: int, call: int, channel: Channel) -> Any:
    try:
        function, args = unpack(call)
        shared = unpack(payload)
    except (ImportError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise Refused(
            "what is sent must arrive in the other process",
            value=f"{type(error).__name__}: {error}",
            place="model, task and job",
            fix="define classes and functions in the task's file or in an installed package",
        ) from error
    return function(shared, channel, *args)


if __name__ == "__main__":
    main()
