"""How a training method trains, as data: length, optimizer, schedule, limits."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from penjing.core.method import Method, Stage
from penjing.train.optimizers import KINDS, Name
from penjing.train.schedule import Schedule


class Strategy(Method):
    """The configuration that all methods that train share; abstract, it has no handler.

    Attributes:
        epochs: passes over the training split; a fraction trains on part of one pass.
        optimizer: `sgd` (with Nesterov momentum 0.9), `adam`, `adamw`, `nadam`, `radam`, `adamax`,
            `rmsprop`, `adagrad`, `adadelta` or `adafactor` (`penjing.train.optimizers`).
        lr: highest learning rate; None: the optimizer's, 0.05 for `sgd`, 0.001 for `adam` and most others.
        batch_size: examples in one step; None: the task's.
        weight_decay: on weights with two or more axes; normalization and biases have none.
        schedule: of the learning rate after a short warm-up, for example `linear`, `cosine`, `step`,
            `one_cycle` (`penjing.train.schedule.rate_factor` lists them).
        clip_norm: largest norm of the gradient of all weights together; None: not clipped.
        max_seconds: the schedule is shortened so that training fits; None: no limit.
        precision: `bfloat16` computes in it (weights, their gradients and the loss are float32 in any case):
            faster on an idle processor that has it, much slower where other processes compete for the
            cores. `auto` takes it where the processor has it and the network is of a kind that gains.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    epochs: float = Field(default=3.0, gt=0, le=10_000)
    optimizer: Name = "sgd"
    lr: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1, le=1_048_576)
    weight_decay: float = Field(default=5e-4, ge=0, lt=1)
    schedule: Schedule = "linear"
    clip_norm: float | None = Field(default=5.0, gt=0)
    max_seconds: float | None = Field(default=None, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "float32"

    @property
    def rate(self) -> float:
        """Return the highest learning rate."""
        return KINDS[self.optimizer].lr if self.lr is None else self.lr
