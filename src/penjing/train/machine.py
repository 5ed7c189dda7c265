"""Which precision and memory layout trains this model fastest on this machine, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penjing.core.backend import Backend
from penjing.core.task import Split
from penjing.train.feed import BatchFeed
from penjing.train.numerics import bfloat16_is_native, numerics_for
from penjing.train.objective import Objective
from penjing.train.parameters import make_optimizer, set_training_mode
from penjing.train.stepper import Stepper
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import nn

WARM, ROUNDS = 2, 7
GAIN = 0.95
"""A choice other than the plain one has to take at most this share of its time."""


@dataclass(frozen=True)
class Probe:
    """What a step took in each way, and the way that was chosen.

    Attributes:
        seconds: the shortest of a step by its precision and layout, in words: what other programs take
            away only ever makes a step longer.
        chosen: one of the keys.
        strategy: the one that was given, with the chosen precision and layout.
    """

    seconds: dict[str, float]
    chosen: str
    strategy: Strategy

    @property
    def gain(self) -> float:
        """Return how many times faster the choice is than float32 in the plain layout."""
        return next(iter(self.seconds.values())) / self.seconds[self.chosen]


def probe_machine(
    model: nn.Module, backend: Backend, split: Split, objective: Objective, strategy: Strategy
) -> Probe:
    """Time training steps in float32 and bfloat16, in both layouts, one after the other in rounds.

    Copies train; the model stays. Bfloat16 is left out where the hardware only emulates it, channels last for
    inputs that are no images. What another program does meanwhile counts for all alike.

    Args:
        model: a torch module.
        backend: of it.
        split: training data.
        objective: what is minimized.
        strategy: its batch size, optimizer and all else that a step is made of.
    """
    import torch

    size = min(strategy.batch_size or len(split), len(split))
    images = split.example()[0].ndim == 4
    device = next((p.device.type for p in model.parameters()), "cpu")
    precisions = ["float32", *["bfloat16"] * bfloat16_is_native(device)]
    ways = [(p, layout) for p in precisions for layout in ("contiguous", *["channels_last"] * images)]
    times: dict[str, list[float]] = {}
    with torch.random.fork_rng(devices=[]):
        steppers = {}
        for precision, layout in ways:
            chosen = strategy.model_copy(update={"precision": precision, "layout": layout})
            steppers[f"{precision}, {layout}"] = chosen, backend.copy(model)
        feed = BatchFeed(split, size, 0).iterate()
        for turn in range(WARM + ROUNDS):
            _, (inputs, targets) = next(feed)
            for name, (chosen, copy) in steppers.items():
                numerics = numerics_for(copy, chosen.precision, chosen.layout)
                with set_training_mode(copy, lambda layer: True) as parameters, numerics.applied(copy):
                    eager = chosen.model_copy(update={"compile": "never"})
                    stepper = Stepper(
                        copy, objective, eager, numerics, make_optimizer(copy, parameters, eager)
                    )
                    stepper.step(0, 2, inputs, targets)
                    start = time.perf_counter()
                    stepper.step(1, 2, inputs, targets)
                    if turn >= WARM:
                        times.setdefault(name, []).append(time.perf_counter() - start)
    seconds = {name: min(each) for name, each in times.items()}
    plain = next(iter(seconds))
    best = min(seconds, key=lambda name: seconds[name])
    chosen_name = best if seconds[best] <= GAIN * seconds[plain] else plain
    return Probe(seconds, chosen_name, steppers[chosen_name][0])
