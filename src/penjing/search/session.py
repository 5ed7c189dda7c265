"""What all steps of one run share, and the exactly-once rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from penjing.core.budget import Budget
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Executor
from penjing.core.plan import digest
from penjing.core.progress import Say
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.value import Model, Value
from penjing.planners.bisection import Bisection
from penjing.run.ledger import Ledger
from penjing.run.stopwatch import Stopwatch

Row = TypeVar("Row", bound=Value)

MOST_ATTEMPTS = 20
"""A piece of work that was begun so often without an end is refused: it may be what ends the driver."""

LEAST_TIMING, MOST_TIMING = 1.5, 10.0
"""Bounds on the seconds of timing in one comparison."""


@dataclass(frozen=True)
class Session:
    """The fixed surroundings of one run.

    Attributes:
        folder: the run directory.
        identity: digest of model, data, target, budget, seed, options and version; part of every key.
        target: where candidates run; the one that was chosen, once it is.
        reference: where the float model runs that they are compared with.
        notes: on what the identity could not read.
        stopwatch: seconds of the run, earlier sessions included.
        all_time_known: whether how long every earlier session took is known.
        say: receives one line of progress at a time.
    """

    folder: Path
    ledger: Ledger
    executor: Executor
    model: Model
    task: Task
    budget: Budget
    target: Target
    reference: Target
    seed: int
    options: Bisection
    identity: str
    notes: tuple[str, ...]
    stopwatch: Stopwatch
    all_time_known: bool
    say: Say

    @property
    def elapsed(self) -> float:
        """Return the seconds that the run has taken, earlier sessions included."""
        return self.stopwatch.elapsed

    @property
    def latency_seconds(self) -> float:
        """Return the seconds of timing in one comparison: a small share of the time that there is."""
        time_limit = self.budget.time
        return MOST_TIMING if time_limit is None else min(MOST_TIMING, max(LEAST_TIMING, time_limit / 40))

    def key(self, kind: str, content: Any) -> str:
        """Return the ledger's key of one piece of work: equal content, equal key."""
        return f"{kind}-{digest([self.identity, kind, content])[:24]}"

    def once(self, kind: str, content: Any, form: type[Row], work: Callable[[], Row]) -> Row:
        """Do a piece of work unless the ledger has its result; either way return the result.

        Args:
            kind: of work.
            content: what tells this piece of work from others of its kind, as plain data.
            form: of the result.
            work: called without arguments.

        Raises:
            Refused: begun too often without an end, or the ledger holds something of another form.
        """
        key = self.key(kind, content)
        known = self.ledger.get(key)
        if known is not None:
            return read_row(form, known, self.ledger.path)
        self.ledger.begin(key, MOST_ATTEMPTS)
        try:
            result = work()
        except KeyboardInterrupt:
            self.ledger.take_back(key)
            raise
        except Refused as refused:
            if refused.code == Exit.ENVIRONMENT:  # the machine's fault: tried again on resume
                with suppress(Refused):  # a full disk does not take that note either
                    self.ledger.take_back(key)
            raise
        self.ledger.put(key, result.model_dump(mode="json") | {"elapsed": self.elapsed})
        return result

    def path(self, *parts: str) -> Path:
        """Return a path inside the run directory."""
        return self.folder.joinpath(*parts)


def read_row(form: type[Row], content: dict[str, Any], ledger: Path) -> Row:
    """Return a row of the ledger as the value that was put there.

    Raises:
        Refused: it is of another form.
    """
    try:
        return form.model_validate({name: value for name, value in content.items() if name != "elapsed"})
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(
            f"must hold a {form.__name__} as this version writes it",
            value=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            place=str(ledger),
            fix="go on with the version of Penjing that began the run, or start a new one",
        ) from error
