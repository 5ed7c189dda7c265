"""Learning-rate range test: the rate rises step by step until the loss does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from penjing.core.backend import Backend
from penjing.core.errors import Refused
from penjing.core.task import Split
from penjing.train.feed import BatchFeed
from penjing.train.numerics import numerics_for
from penjing.train.objective import Objective
from penjing.train.parameters import make_optimizer, set_training_mode
from penjing.train.stepper import Stepper
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import nn

SMOOTHED = 0.9
"""Weight of the past in the smoothed loss."""

RISEN = 1.5
"""The test ends once the smoothed loss is so many times its smallest value."""


@dataclass(frozen=True)
class RangeTest:
    """Losses at rising rates.

    Attributes:
        rates: of each step, rising.
        losses: smoothed training loss after each step.
        suggestion: the rate at which the loss fell fastest.
        highest: the rate at which it was smallest: above it training breaks down.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float
    highest: float


def run_range_test(
    model: nn.Module,
    backend: Backend,
    split: Split,
    objective: Objective,
    strategy: Strategy,
    *,
    steps: int = 100,
    span: tuple[float, float] = (1e-3, 1e2),
    seed: int = 0,
) -> RangeTest:
    """Train a copy of a model while the rate rises exponentially (Smith 2017, "Cyclical learning rates").

    Args:
        model: a torch module; it stays.
        backend: of it.
        split: training data.
        objective: what is minimized.
        strategy: its optimizer and batch size count, its schedule does not.
        steps: at most so many, at least 10.
        span: lowest and highest rate as shares of the optimizer's own.
        seed: of the order of the data.

    Raises:
        Refused: no rate at which the loss falls.
    """
    import torch

    lowest, highest = (share * strategy.model_copy(update={"lr": None}).peak_lr for share in span)
    growth = (highest / lowest) ** (1 / (steps - 1))
    own = {
        "lr": lowest,
        "schedule": "constant",
        "warmup": 0.0,
        "averaging": "none",
        "start_size": 1.0,
        "compile": "never",
    }
    strategy = strategy.model_copy(update=own)
    copy = backend.copy(model)
    numerics = numerics_for(copy, strategy.precision, strategy.layout)
    size = min(strategy.batch_size or len(split), len(split))
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    with (
        torch.random.fork_rng(devices=[]),
        set_training_mode(copy, lambda layer: True) as parameters,
        numerics.applied(copy),
    ):
        torch.manual_seed(seed)
        optimizer = make_optimizer(copy, parameters, strategy)
        stepper = Stepper(copy, objective, strategy, numerics, optimizer)
        for _, (inputs, targets) in BatchFeed(split, size, seed).iterate():
            rate = stepper.learning_rate(0, 1)
            loss = stepper.step(0, 1, inputs, targets)
            if loss is None:
                break
            mean = SMOOTHED * mean + (1 - SMOOTHED) * loss
            rates.append(rate)
            losses.append(mean / (1 - SMOOTHED ** len(rates)))
            if len(rates) >= steps or losses[-1] > RISEN * min(losses):
                break
            stepper.scale_lr(growth)
    return suggest_rate(rates, losses)


def suggest_rate(rates: list[float], losses: list[float]) -> RangeTest:
    """Return the test with what it suggests.

    Args:
        rates: of each step, rising.
        losses: smoothed training loss after each step.

    Raises:
        Refused: the loss never fell.

    >>> suggest_rate([0.01, 0.1, 1.0, 10.0], [2.0, 1.9, 1.0, 3.0]).highest
    1.0
    """
    end = losses.index(min(losses)) if losses else 0
    if end < 2:
        raise Refused(
            "the loss must fall at some learning rate",
            value=f"none in {len(losses)} steps",
            place="range test",
            fix="check the data and the loss",
        )
    steps = [math.log(b / a) for a, b in pairwise(rates)]
    slopes = [
        (losses[i + 1] - losses[i - 1]) / (steps[i - 1] + steps[i]) for i in range(1, end)
    ]  # central differences by the logarithm of the rate
    fastest = 1 + slopes.index(min(slopes))
    return RangeTest(tuple(rates), tuple(losses), rates[fastest], rates[end])
