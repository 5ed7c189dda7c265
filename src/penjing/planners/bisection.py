"""The first planner: uniform plans, precision by trial, channel ratio by bisection with a margin.

For every precision that the target can run, the model is quantized as it is; the fastest one that keeps
the quality is combined with channel pruning and distillation from the original. The largest ratio whose
quality will probably be certified is found by bisection. What the certificate will cost is part of the
question: a trial passes when its drop plus the half-width of the coming test stays within the limit.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from pydantic import Field

from penjing.arrays.selection import kept_width
from penjing.core.budget import Budget
from penjing.core.method import Value
from penjing.core.plan import Plan, chain, plan_from_json
from penjing.core.search import Planner
from penjing.core.trial import Trial
from penjing.distill.logits import Distill
from penjing.planners.forecast import WITHOUT_TIME
from penjing.prune.channels import PruneChannels
from penjing.repair.batchnorm import ReestimateBatchNorm

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
        round_to: kept widths are multiples of this; several values are compared on the clock first,
            untrained; the driver compares `ROUNDINGS` where there is time for it.
    """

    first: float = Field(default=0.5, gt=0, lt=1)
    resolution: float = Field(default=0.1, gt=0, lt=1)
    epochs: float | None = Field(default=None, gt=0)
    patience: int = Field(default=1, ge=0)
    round_to: tuple[int, ...] = ROUNDINGS[:1]
    score: Literal["l2", "taylor"] = "taylor"


@dataclass(frozen=True)
class Setting:
    """What the planner knows of the job before its first proposal.

    Attributes:
        baseline: the float model in the target, as a trial of the empty plan.
        precisions: the recipes of the stage PRECISION that this model and target allow.
        prunable, batchnorm, trainable: what the model offers.
        n_test: examples of the split that will certify.
        training_precision: in which training was found faster on this machine.
        widths: units of each group of channels; empty where they are not known.
    """

    budget: Budget
    baseline: Trial
    precisions: tuple[Plan, ...]
    prunable: bool
    batchnorm: bool
    trainable: bool
    n_test: int
    training_precision: Literal["float32", "bfloat16"] = "float32"
    widths: tuple[int, ...] = ()

    def structure(self, ratio: float, round_to: int) -> tuple[float, ...]:
        """Return what a ratio comes to: equal structures are not tried twice."""
        return tuple(kept_width(width, ratio, 1, round_to) for width in self.widths) or (ratio,)

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


def bisection(setting: Setting, options: Bisection | None = None) -> Planner:
    """Propose plans; told of each trial, end when the largest ratio that passes is known."""
    options = options or Bisection()
    epochs = options.epochs or WITHOUT_TIME
    best = setting.baseline
    for plan in setting.precisions:
        trial = yield plan
        if setting.passes(trial) and _faster(trial, best):
            best = trial
    if not setting.prunable:
        return
    precision = plan_from_json(best.plan)
    round_to = yield from _rounding(setting, options, precision)
    low, high, ratio = 0.0, 1.0, options.first
    failed: float | None = None
    known: dict[tuple[float, ...], bool] = {setting.structure(0.0, round_to): True}
    while high - low > options.resolution:
        structure = setting.structure(ratio, round_to)
        if structure not in known:
            trial = yield _plan(setting, options, ratio, round_to, precision, epochs)
            known[structure] = _more(setting, trial, best)
            if known[structure]:
                best = trial
            else:
                failed = ratio if _worth_training_longer(setting, trial) else None
        low, high = (ratio, high) if known[structure] else (low, ratio)
        ratio = round((low + high) / 2, 3)
    if failed is None or not setting.trainable:
        return
    for again in range(options.patience):
        trial = yield _plan(setting, options, failed, round_to, precision, epochs * 2 ** (again + 1))
        if setting.passes(trial):
            return


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


def _rounding(setting: Setting, options: Bisection, precision: Plan) -> Generator[Plan, Trial, int]:
    """Compare the roundings on the clock, without training, and return the one that runs fastest.

    Kernels work on blocks of channels, so that a coarser multiple can be as fast as a finer one that removes
    more: within a twentieth, the coarsest is taken.
    """
    if len(options.round_to) == 1:
        return options.round_to[0]
    times: dict[int, float] = {}
    for multiple in options.round_to:
        trial = yield chain(PruneChannels(ratio=options.first, score="l2", round_to=multiple), precision)
        times[multiple] = trial.latency_ms if trial.latency_ms is not None else float("inf")
    return max(multiple for multiple, ms in times.items() if ms <= CLOSE * min(times.values()))


def _plan(
    setting: Setting, options: Bisection, ratio: float, round_to: int, precision: Plan, epochs: float
) -> Plan:
    cut = PruneChannels(ratio=ratio, score=options.score, round_to=round_to)
    repair = (ReestimateBatchNorm(),) if setting.batchnorm else ()
    recover = Distill(epochs=epochs, lr=0.1, schedule="one_cycle", precision=setting.training_precision)
    recovers = (recover,) if setting.trainable else ()
    return chain(cut, repair, recovers, precision)


def _faster(trial: Trial, than: Trial) -> bool:
    a, b = trial.latency_ms, than.latency_ms
    return a is not None and b is not None and a < b


def _slower(trial: Trial, than: Trial) -> bool:
    a, b = trial.latency_ms, than.latency_ms
    return a is not None and b is not None and a > 1.02 * b
