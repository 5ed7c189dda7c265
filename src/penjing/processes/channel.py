"""The child's end of the line to its driver: requests that come, progress and answers that go."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from penjing.core.errors import Refused
from penjing.core.executor import refusal_of
from penjing.core.progress import Line
from penjing.core.system import system_fault

Message = dict[str, Any]


class Channel:
    """Messages over one socket, each a line of JSON.

    Args:
        descriptor: of the socket; nothing that a library prints can get there.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._sending = threading.Lock()

    def say(self, line: Line) -> None:
        """Send a line of progress; safe from any thread."""
        self.send({"say": line.model_dump()})

    def send(self, message: Message) -> None:
        """Send a message whole."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            while data:
                data = data[os.write(self.descriptor, data) :]

    def requests(self) -> Iterator[Message]:
        """Yield the driver's requests as they come, until it closes its end."""
        with os.fdopen(os.dup(self.descriptor), "rb") as stream:
            for line in stream:
                yield json.loads(line)


def attempt(work: Callable[[], Any]) -> Message:
    """Run some work and return how it ended, as data: `done`, `refused` or `crashed`.

    >>> attempt(lambda: {"x": 1})
    {'status': 'done', 'value': {'x': 1}}
    """
    try:
        return {"status": "done", "value": plain(work())}
    except Refused as refused:
        refusal = refusal_of(refused)
        said = {"refusal": refusal.model_dump(), "reason": str(refused), "fault": refusal.fault}
        return {"status": "refused"} | said
    # One candidate's defect, even a call of sys.exit, must not end the run; it is reported in full.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return {
            "status": "crashed",
            "reason": f"{type(error).__name__}: {error}",
            "fault": system_fault(error),
            "detail": traceback.format_exc(),
        }


def plain(value: Any) -> dict[str, Any]:
    """Return a result as the plain data that comes out of JSON.

    >>> plain({1: (2, 3)})
    {'1': [2, 3]}

    Raises:
        TypeError, ValueError: it is no mapping, or holds NaN or something else that JSON cannot carry.
    """
    if not isinstance(value, dict):
        raise TypeError(f"a job returns a mapping of plain data, not {type(value).__name__}")
    data: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return data
