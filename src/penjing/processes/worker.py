"""The process of one candidate: a small supervisor and, forked from it, the job.

The supervisor never runs the user's code, so nothing there can hang it. It reports how the job ended (signal
or exit code, largest memory) and ends the whole group when the driver is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

from penjing.core.errors import Refused
from penjing.core.executor import refusal_of
from penjing.processes.packing import unpack

_PR_SET_PDEATHSIG = 1
_SENDING = threading.Lock()


def main() -> NoReturn:
    """Run the job whose files the driver passed on: `worker PAYLOAD ARGUMENTS REPLY LIFE` (descriptors)."""
    payload, arguments, reply, life = (int(text) for text in sys.argv[1:5])
    for descriptor in (payload, arguments, reply, life):
        os.set_inheritable(descriptor, False)
    driver, supervisor = os.getppid(), os.getpid()
    job = os.fork()
    if job == 0:
        os.close(life)
        _die_with(supervisor)
        _work(payload, arguments, reply)
    _supervise(job, driver, reply, life)


def checked(value: Any) -> dict[str, Any]:
    """Return a job's result as the plain data that comes out of JSON.

    Raises:
        TypeError, ValueError: it is no mapping, or holds NaN or something else that JSON cannot carry.
    """
    if not isinstance(value, dict):
        raise TypeError(f"a job returns a mapping of plain data, not {type(value).__name__}")
    plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return plain


def _supervise(job: int, driver: int, reply: int, life: int) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(driver, life), daemon=True).start()
    _, status, usage = os.wait4(job, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # The job may have died within a line.
    os.write(reply, b"\n")
    _send(reply, {"ended": os.waitstatus_to_exitcode(status), "peak_bytes": peak})
    os._exit(0)


def _end_with(driver: int, life: int) -> None:
    """End the group when the driver closes its end of the pipe, or is no more (a fork may hold that end)."""
    while os.getppid() == driver:
        if select.select([life], [], [], 1.0)[0]:
            break
    os.killpg(0, signal.SIGKILL)


def _die_with(supervisor: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:  # it died before the line above
        os._exit(1)


def _work(payload: int, arguments: int, reply: int) -> NoReturn:
    """Run the job; leave at once, so that a hook that hangs at exit cannot hold a finished result."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _send(reply, _outcome(payload, arguments, reply))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed by the job
                stream.flush()
    finally:
        os._exit(0)


def _outcome(payload: int, arguments: int, reply: int) -> dict[str, Any]:
    try:
        job, args = unpack(arguments)
        value = job(unpack(payload), lambda line: _send(reply, {"say": line.model_dump()}), *args)
        return {"status": "done", "value": checked(value)}
    except Refused as refused:
        return {"status": "refused", "refusal": refusal_of(refused).model_dump(), "reason": str(refused)}
    # One candidate's defect, even a call of sys.exit, must not end the run; it is reported in full.
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001
        return {
            "status": "crashed",
            "reason": f"{type(error).__name__}: {error}",
            "detail": traceback.format_exc(),
        }


def _send(reply: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    with _SENDING:
        while data:
            data = data[os.write(reply, data) :]


if __name__ == "__main__":
    main()
