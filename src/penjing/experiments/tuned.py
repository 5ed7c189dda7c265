"""What a search for a training strategy found."""

from __future__ import annotations

from pathlib import Path

from penjing.core.goal import Goal
from penjing.core.value import Model, Value
from penjing.experiments.fit import FitRecord
from penjing.train.strategy import Strategy

LEDGER, RECORD, REPORT = "tune.sqlite", "tune.json", "tune.html"


class Timed(Value):
    """What a part of the search found, with the wall time that it took."""

    spent_s: float


class MachineProbe(Timed):
    """What the probe of the machine chose.

    Attributes:
        strategy: with the precision and memory layout whose steps are the fastest.
        seconds: of a training step, by precision and layout.
        why: in words.
    """

    strategy: Strategy
    seconds: dict[str, float]
    why: str


class RateRange(Timed):
    """The learning rates that are tried with an optimizer.

    Attributes:
        lowest, highest: bounds of the search.
        rates, losses: of the range test; empty where there was none.
        why: in words.
    """

    lowest: float
    highest: float
    rates: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    why: str


class TunedRun(Timed):
    """One run of the search.

    Attributes:
        round: of the halving, from 0.
        seconds: that the run had.
        strategy: it trained by.
        weights: file of its weights, which stays for the best run alone.
        record: of the training; None where it was refused.
        refused: why there is no record.
    """

    round: int
    seconds: float
    strategy: Strategy
    weights: str
    record: FitRecord | None = None
    refused: str = ""


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
    strategy: Strategy
    seconds: float
    quality: float
    test_quality: float
    runs: tuple[TunedRun, ...]
    ranges: dict[str, RateRange]
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
