"""The first planner: precision by trial, then one lever of structure after another, by bisection.

For every precision that the target can run, the model is quantized as it is; the fastest one that keeps
the quality goes on. Where their order was measured before, the first that keeps it is the last one tried.
Levers are the share of channels that goes, rounded as kernels like it, and the share of whole blocks. Where
there is time each is tried once, repaired and measured but not trained, and the one that loses least for the
time that it saves comes first. The largest share whose quality will probably be certified after recovery is
found by bisection, then that of the next lever on top of it. What the certificate will cost is part of the
question: a trial passes when its drop plus the half-width of the coming test stays within the limit.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from pydantic import Field

from penjing.arrays.structure.selection import kept_width
from penjing.core.budget import Budget
from penjing.core.plan import Plan, chain, plan_from_json
from penjing.core.search import Planner
from penjing.core.trial import Trial
from penjing.core.value import Value
from penjing.planners.forecast import WITHOUT_TIME
from penjing.planners.recovery import plan_recovery
from penjing.prune.blocks import RemoveBlocks
from penjing.prune.channels import PruneChannels

LEAST_EVIDENCE = 3.0
"""Even if no prediction changes, n examples bound the drop by about 3 / n at best (the rule of three)."""


ROUNDINGS = (8, 16)
"""Widths of the blocks that kernels work on: eight floats in 256 bits, sixteen in 512."""

CLOSE = 1.05
"""Latencies within this ratio count as equal when roundings are compared."""


class Bisection(Value):
    """How the bisection works.

    Attributes:
        first: the first ratio tried.
        resolution: the search ends when the ratio is known to within this.
        epochs: of distillation in each trial; None: as many as the time allows.
        patience: how often the smallest ratio that failed is tried again, each time with twice the epochs.
        round_to: kept widths are multiples of this; where there are several, or `compare` is set, every lever
            is tried untrained first.
        compare: whether whole blocks are a lever too, compared with channels at `first`.
    """

    first: float = Field(default=0.5, gt=0, lt=1)
    resolution: float = Field(default=0.1, gt=0, lt=1)
    epochs: float | None = Field(default=None, gt=0)
    patience: int = Field(default=1, ge=0)
    round_to: tuple[int, ...] = ROUNDINGS[:1]
    compare: bool = False
    score: Literal["l2", "taylor"] = "taylor"


@dataclass(frozen=True)
class Setting:
    """What the planner knows of the job before its first proposal.

    Attributes:
        baseline: the float model in the target, as a trial of the empty plan.
        precisions: the recipes of the stage PRECISION that this model and target allow.
        prunable, trainable: what the model offers.
        repair: what follows every cut.
        n_test: examples of the split that will certify.
        training_precision: in which training was found faster on this machine.
        widths: units of each group of channels; empty where they are not known.
        blocks: how many whole blocks could go.
        start: the float model where the trials run, where that is not where the baseline runs.
        ordered: whether the recipes were measured and the fastest come first.
    """

    budget: Budget
    baseline: Trial
    precisions: tuple[Plan, ...]
    prunable: bool
    repair: Plan
    trainable: bool
    n_test: int
    training_precision: Literal["float32", "bfloat16"] = "float32"
    widths: tuple[int, ...] = ()
    blocks: int = 0
    start: Trial | None = None
    ordered: bool = False

    def passes(self, trial: Trial) -> bool:
        """Tell whether a trial will probably be certified: drop + z sqrt(flips / n_test) within the limit."""
        if trial.status != "done":
            return False
        if self.budget.max_drop is None:
            return True
        if trial.drop is None:
            return False
        flips = abs(trial.drop) if trial.flips is None else trial.flips
        z = NormalDist().inv_cdf(self.budget.confidence)
        half_width = max(z * (flips / self.n_test) ** 0.5, LEAST_EVIDENCE / self.n_test)
        return bool(trial.drop + half_width <= self.budget.max_drop)


@dataclass(frozen=True)
class Lever:
    """One thing to turn: which share of the channels goes, or which share of the blocks.

    `round_to` is of channels, in groups of these `widths`; None for whole blocks: there are `blocks`.
    """

    score: Literal["l2", "taylor"]
    round_to: int | None
    widths: tuple[int, ...] = ()
    blocks: int = 0

    def cut(self, ratio: float) -> Plan:
        """Return the structural step for a share."""
        if self.round_to is None:
            return (RemoveBlocks(ratio=ratio),)
        return (PruneChannels(ratio=ratio, score=self.score, round_to=self.round_to),)

    def structure(self, ratio: float) -> tuple[float, ...]:
        """Return what a share comes to: equal structures are not tried twice."""
        if self.round_to is None:
            return (min(math.floor(ratio * self.blocks + 0.5), self.blocks - 1),)
        return tuple(kept_width(w, ratio, 1, self.round_to) for w in self.widths) or (ratio,)


def bisect(setting: Setting, options: Bisection | None = None) -> Planner:
    """Propose plans; told of each trial, end when every lever's largest share that passes is known."""
    options = options or Bisection()
    best = setting.start or setting.baseline
    for plan in setting.precisions:
        trial = yield plan
        if setting.passes(trial) and _faster(trial, best):
            best = trial
            if setting.ordered and not trial.breaks.keys() & {"size", "memory"}:
                break
    search = _Search(setting, options, plan_from_json(best.plan))
    levers = yield from _levers(search, best)
    for number, lever in enumerate(levers):
        first = options.first / 2**number
        best = yield from _bisect(search, lever, best, first)


@dataclass
class _Search:
    """What is fixed (precision) and what was found so far (the cut of the levers that are done)."""

    setting: Setting
    options: Bisection
    precision: Plan
    cut: Plan = ()

    def plan(self, step: Plan, epochs: float | None) -> Plan:
        """Return a whole plan with one more structural step, trained where epochs are given."""
        structure = sorted((*self.cut, *step), key=lambda method: isinstance(method, PruneChannels))
        recovers: Plan = ()
        if self.setting.trainable and epochs is not None:
            recovers = (plan_recovery(epochs, self.setting.training_precision),)
        return chain(structure, self.setting.repair, recovers, self.precision)


def _levers(search: _Search, best: Trial) -> Generator[Plan, Trial, list[Lever]]:
    """Return the levers, the most promising first; tried untrained where there is a choice."""
    setting, options = search.setting, search.options
    multiples = options.round_to if setting.prunable else ()
    widths = [Lever(options.score, multiple, widths=setting.widths) for multiple in multiples]
    shortens = options.compare and setting.blocks > 1
    depth = [Lever(options.score, None, blocks=setting.blocks)] if shortens else []
    if len(widths) + len(depth) < 2:
        return [*widths, *depth]
    prices: dict[Lever, float] = {}
    times: dict[Lever, float] = {}
    for lever in (*widths, *depth):
        trial = yield search.plan(lever.cut(options.first), None)
        times[lever] = trial.latency_ms if trial.latency_ms is not None else math.inf
        prices[lever] = _price(trial, best)
    chosen = [_coarsest(widths, times)] if widths else []
    return sorted([*chosen, *depth], key=lambda lever: prices[lever])


def _coarsest(widths: list[Lever], times: dict[Lever, float]) -> Lever:
    """Return the coarsest rounding among the fastest.

    Kernels work on blocks of channels, so that a coarser multiple can be as fast as a finer one that removes
    more: within a twentieth, the coarsest is taken.
    """
    fastest = min(times[lever] for lever in widths)
    return max((x for x in widths if times[x] <= CLOSE * fastest), key=lambda x: x.round_to or 0)


def _price(trial: Trial, best: Trial) -> float:
    """Return the quality that a lever costs, repaired and untrained, for each factor e of time saved."""
    if trial.latency_ms is None or not best.latency_ms:
        return math.inf if trial.drop is None else trial.drop
    saved = math.log(best.latency_ms / trial.latency_ms)
    if saved <= math.log(CLOSE) or trial.drop is None:
        return math.inf
    return max(trial.drop, 0.0) / saved


def _bisect(search: _Search, lever: Lever, best: Trial, first: float) -> Generator[Plan, Trial, Trial]:
    """Find the largest share of one lever that passes, and keep its cut; return the best trial."""
    setting, options = search.setting, search.options
    epochs = options.epochs or WITHOUT_TIME
    low, high, ratio = 0.0, 1.0, first
    failed: float | None = None
    known: dict[tuple[float, ...], bool] = {lever.structure(0.0): True}
    while high - low > options.resolution:
        structure = lever.structure(ratio)
        if structure not in known:
            trial = yield search.plan(lever.cut(ratio), epochs)
            known[structure] = _more(setting, trial, best)
            if known[structure]:
                best = trial
            else:
                failed = ratio if _worth_training_longer(setting, trial) else None
        low, high = (ratio, high) if known[structure] else (low, ratio)
        ratio = round((low + high) / 2, 3)
    for again in range(options.patience if failed is not None and setting.trainable else 0):
        assert failed is not None
        trial = yield search.plan(lever.cut(failed), epochs * 2 ** (again + 1))
        if setting.passes(trial):
            low, best = failed, trial if _faster(trial, best) else best
            break
    if low > 0:
        search.cut = (*search.cut, *lever.cut(low))
    return best


def _more(setting: Setting, trial: Trial, best: Trial) -> bool:
    """Tell whether a larger ratio is worth a trial.

    With a limit on quality: as long as the quality holds and the clock gains. Without one: as long as a
    limit on cost is still broken.
    """
    if trial.status != "done":
        return False
    if setting.budget.max_drop is None:
        return not trial.feasible
    return setting.passes(trial) and not _slower(trial, best)


def _worth_training_longer(setting: Setting, trial: Trial) -> bool:
    """Tell whether quality is what a trial lacked; without a limit on it, more is always wanted."""
    return trial.status == "done" and (setting.budget.max_drop is None or not setting.passes(trial))


def _faster(trial: Trial, than: Trial) -> bool:
    a, b = trial.latency_ms, than.latency_ms
    return a is not None and b is not None and a < b


def _slower(trial: Trial, than: Trial) -> bool:
    a, b = trial.latency_ms, than.latency_ms
    return a is not None and b is not None and a > 1.02 * b
