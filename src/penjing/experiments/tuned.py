"""What a search for a training strategy found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penjing.core.goal import Goal
from penjing.core.value import Model, Value
from penjing.experiments.fit import FitRecord
from penjing.train.strategy import Strategy

LEDGER, RECORD, REPORT = "tune.sqlite", "tune.json", "tune.html"


class TunedRun(Value):
    """One run of the search: its round, the time it had, and its record; `refused` says why there is none.

    `weights` names the file of its weights, which stays for the best run alone.
    """

    round: int
    seconds: float
    strategy: dict[str, Any]
    weights: str
    record: FitRecord | None
    refused: str = ""
    spent_s: float


class TuneRecord(Value):
    """What a search for a strategy found.

    Attributes:
        goal: what a run had to reach on valid.
        best: index of the run that was chosen: the first to the goal in training time, or, where none
            reached it, the best in quality.
        reached: whether the goal was reached.
        strategy: of the best run; its `epochs` are those that its time allowed.
        seconds: of training until the best run reached the goal; of all of it where none did.
        quality, test_quality: of its model on valid, and on test, which no choice has seen.
        runs: all of them, in order.
        ranges: by optimizer, rates and losses of its range test.
        probe: seconds a step by precision and layout.
        spent_s: of the whole search.
        events: what was decided, and why.
    """

    goal: Goal
    metric: str
    best: int
    reached: bool
    strategy: dict[str, Any]
    seconds: float
    quality: float
    test_quality: float
    runs: tuple[TunedRun, ...]
    ranges: dict[str, dict[str, Any]]
    probe: dict[str, float]
    spent_s: float
    events: tuple[str, ...]


class Tuned:
    """The strategy that was found, and a model trained by it.

    Attributes:
        strategy: trains to the goal in the shortest time that was found.
        model: of the best run.
        record: the whole search.
        folder: where ledger, record, weights and report lie.
    """

    def __init__(self, strategy: Strategy, model: Model, record: TuneRecord, folder: Path) -> None:
        self.strategy, self.model, self.record, self.folder = strategy, model, record, folder

    @property
    def report(self) -> Path:
        """Return the path of the HTML report."""
        return self.folder / REPORT

    def __repr__(self) -> str:
        reached = f"in {self.record.seconds:.1f} s" if self.record.reached else "not reached"
        return f"Tuned({self.record.goal} {reached}: {self.strategy!r})"
