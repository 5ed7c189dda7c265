"""Search for a training strategy: short annealed runs, the best third of which get three times the time.

Successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification"; here thirds) over
proposals of a tree-structured Parzen estimator (Bergstra et al. 2011; Optuna's). Every run is a whole one:
its schedule comes to its end within its time, so that its quality is what so much time is worth. Once a run
reaches the goal, the time of the best strategies is narrowed down to what the goal needs.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from penjing.core.errors import Refused
from penjing.core.extras import need
from penjing.core.progress import Line, Say
from penjing.core.value import Value
from penjing.train.optimizers import OPTIMIZERS, OptimizerName
from penjing.train.schedule import Schedule
from penjing.train.strategy import Strategy

KEPT = 3
"""One of so many runs goes on, with so many times the time."""

CLOSE = 1.2
"""The time that the goal needs is narrowed down to within this ratio."""

FIRST_SHARE = 1 / 50
"""Time of a run of the first round, as a share of all of it."""

SCHEDULES: tuple[Schedule, ...] = ("linear", "one_cycle", "warmup_stable_decay")
BATCHES = (0.5, 1.0, 2.0, 4.0)
"""Batch sizes that are tried, as shares of the strategy's own."""


@dataclass(frozen=True)
class SearchSpace:
    """What may be tried.

    Attributes:
        base: gives all that is not searched for.
        rates: lowest and highest rate of each optimizer that is tried, as range tests found them.
        examples: in the training split: no batch holds more than an eighth of them.
        smooths: whether label smoothing fits the loss.
        seconds: of all runs together.
        first: runs of the first round.
        up: whether a higher quality is better.
        seed: of the proposals.
    """

    base: Strategy
    rates: dict[OptimizerName, tuple[float, float]]
    examples: int
    smooths: bool
    seconds: float
    first: int = 9
    up: bool = True
    seed: int = 0


class PlannedRun(Value):
    """A run to be made: a strategy that ends within `seconds`, in a round from 0."""

    strategy: Strategy
    seconds: float
    round: int


class RunResult(Value):
    """What a run came to.

    Attributes:
        quality: on valid; None where it was refused.
        reached_s: seconds of training until the goal was met; None where it was not.
        spent_s: wall time of it all.
    """

    quality: float | None
    reached_s: float | None
    spent_s: float


def halving(space: SearchSpace, say: Say) -> Generator[PlannedRun, RunResult, None]:
    """Yield runs and be sent the result of each; ends when time is over or the goal's time is known.

    Raises:
        Refused: Optuna is not installed.
    """
    need("tune", "tuning")
    left = space.seconds
    seconds = FIRST_SHARE * space.seconds
    proposals = _Proposals(space)
    found: list[tuple[Strategy, RunResult]] = []
    for _ in range(space.first):
        number, strategy = proposals.ask()
        ended = yield PlannedRun(strategy=strategy, seconds=seconds, round=0)
        proposals.tell(number, ended.quality)
        found.append((strategy, ended))
        left -= ended.spent_s
    level = 0
    while not any(ended.reached_s is not None for _, ended in found):
        best = _best(found, space.up)[: max(1, math.ceil(len(found) / KEPT))]
        longer = min(KEPT * seconds, 0.9 * left)
        if not best or longer < 1.1 * seconds:
            say(Line.note("the time is over before any strategy reached the goal"))
            return
        found, level, seconds = [], level + 1, longer
        for strategy in best:
            if left < 0.5 * seconds and found:
                break
            ended = yield PlannedRun(strategy=strategy, seconds=seconds, round=level)
            found.append((strategy, ended))
            left -= ended.spent_s
    yield from _bisect_time(found, seconds / KEPT if level else 0.0, left, level)


def _best(found: Sequence[tuple[Strategy, RunResult]], up: bool) -> list[Strategy]:
    """Return the strategies whose runs ended, the best quality first."""
    done = [(ended.quality if up else -ended.quality, s) for s, ended in found if ended.quality is not None]
    return [strategy for _, strategy in sorted(done, key=lambda pair: -pair[0])]


def _bisect_time(
    found: Sequence[tuple[Strategy, RunResult]], too_short: float, left: float, level: int
) -> Generator[PlannedRun, RunResult, None]:
    """Narrow down the time that the quickest strategies need, by bisection on its logarithm."""
    reached = [(ended.reached_s, strategy) for strategy, ended in found if ended.reached_s is not None]
    quickest = min(time for time, _ in reached)
    for time, strategy in sorted(reached, key=lambda pair: pair[0]):
        low, high = too_short, min(time, quickest)
        while high > CLOSE * max(low, 1e-3 * high):
            tried = math.sqrt(low * high) if low else high / 2
            if tried > left:
                return
            ended = yield PlannedRun(strategy=strategy, seconds=tried, round=level + 1)
            left -= ended.spent_s
            if ended.reached_s is None:
                low = tried
            else:
                high = quickest = min(ended.reached_s, high)
            if low > quickest / CLOSE:
                break


class _Proposals:
    """Optuna's study over the space; its own storage is memory, since the ledger keeps every run."""

    def __init__(self, space: SearchSpace) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._distributions = self._made(optuna.distributions)
        self._study = optuna.create_study(
            direction="maximize" if space.up else "minimize",
            sampler=optuna.samplers.TPESampler(seed=space.seed, n_startup_trials=max(4, space.first // 2)),
        )
        sizes = self._distributions["batch"].choices
        known: dict[str, Any] = {
            "schedule": "one_cycle",
            "batch": 1.0 if 1.0 in sizes else sizes[-1],
            "rate": 0.5,
            "averaging": "none",
        }
        for name in space.rates:
            self._study.enqueue_trial(known | {"optimizer": name, "decay": space.base.weight_decay or 1e-6})
        self._asked: dict[int, Any] = {}

    def ask(self) -> tuple[int, Strategy]:
        """Return a proposal with its number."""
        trial = self._study.ask(self._distributions)
        self._asked[trial.number] = trial
        return trial.number, self._strategy(trial.params)

    def tell(self, number: int, quality: float | None) -> None:
        """Say how a proposal ended."""
        import optuna

        failed = optuna.trial.TrialState.FAIL if quality is None else None
        self._study.tell(self._asked.pop(number), quality, state=failed)

    def _made(self, kinds: Any) -> dict[str, Any]:
        space = self._space
        size = space.base.batch_size or 128
        batches = [share for share in BATCHES if 4 <= share * size <= max(4, space.examples / 8)] or [1.0]
        made = {
            "optimizer": kinds.CategoricalDistribution(list(space.rates)),
            "schedule": kinds.CategoricalDistribution(list(SCHEDULES)),
            "batch": kinds.CategoricalDistribution(batches),
            "rate": kinds.FloatDistribution(0.0, 1.0),
            "decay": kinds.FloatDistribution(1e-6, 1e-2, log=True),
            "averaging": kinds.CategoricalDistribution(["none", "ema"]),
        }
        if space.smooths:
            made["smoothing"] = kinds.CategoricalDistribution([0.0, 0.1])
        return made

    def _strategy(self, chosen: dict[str, Any]) -> Strategy:
        name: OptimizerName = chosen["optimizer"]
        lowest, highest = self._space.rates[name]
        share = chosen["batch"]
        rate = lowest ** (1 - chosen["rate"]) * highest ** chosen["rate"]
        # Larger batches bear larger rates: in proportion for sgd (Goyal et al. 2017), by the root elsewhere.
        rate *= share if name == "sgd" else math.sqrt(share)
        fields: dict[str, Any] = {
            "optimizer": name,
            "schedule": None if OPTIMIZERS[name].modes else chosen["schedule"],
            "batch_size": int(share * (self._space.base.batch_size or 128)),
            "lr": float(f"{rate:.3g}"),
            "weight_decay": float(f"{chosen['decay']:.2g}"),
            "averaging": "none" if OPTIMIZERS[name].modes else chosen["averaging"],
            "label_smoothing": chosen.get("smoothing", self._space.base.label_smoothing),
        }
        return self._space.base.model_copy(update=fields)


def check_optimizers(names: Sequence[str]) -> None:
    """Refuse names that no optimizer has, and none at all.

    Raises:
        Refused: see above.
    """
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown or not names:
        raise Refused(
            "must name known optimizers, at least one",
            value=", ".join(unknown) or "none",
            place="optimizers",
            fix=f"choose among {', '.join(OPTIMIZERS)}",
        )
