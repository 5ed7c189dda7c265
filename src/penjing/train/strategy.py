"""How a model trains, as data: length, optimizer, rate, averaging, regularization, limits."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from penjing.core.config import refusal
from penjing.core.task import Task
from penjing.core.value import Value
from penjing.train.optimizers import OPTIMIZERS, OptimizerName
from penjing.train.schedule import Schedule


class StrategyFields(Value):
    """The fields of a strategy, which `Strategy` explains."""

    epochs: float = Field(default=3.0, gt=0, le=10_000)
    optimizer: OptimizerName = "sgd"
    lr: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1, le=1_048_576)
    weight_decay: float = Field(default=5e-4, ge=0, lt=1)
    schedule: Schedule | None = None
    warmup: float = Field(default=0.05, ge=0, lt=1)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    clip_norm: float | None = Field(default=5.0, gt=0)
    averaging: Literal["none", "ema", "swa", "latest"] = "none"
    sam: float | None = Field(default=None, gt=0, le=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, le=10)
    cutmix: float = Field(default=0.0, ge=0, le=10)
    flip: bool = False
    shift: int = Field(default=0, ge=0, le=64)
    start_size: float = Field(default=1.0, gt=0, le=1)
    stochastic_depth: float = Field(default=0.0, ge=0, lt=1)
    recompute: bool = False
    batchnorm: Literal["train", "frozen"] = "train"
    ghost_batch: int | None = Field(default=None, ge=2, le=65_536)
    patience: int | None = Field(default=None, ge=1, le=10_000)
    accumulation_steps: int = Field(default=1, ge=1, le=65_536)
    max_seconds: float | None = Field(default=None, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: Literal["never", "auto", "always"] = "never"
    shard: bool = False


class Strategy(StrategyFields):
    """How to train, for `pj.fit` and for every method that trains, which takes these fields beside its own.

    Attributes:
        epochs: passes over the training split, above 0; a fraction trains on part of one pass.
        optimizer: `sgd` (with Nesterov momentum 0.9), `adam`, `adamw`, `nadam`, `radam`, `adamax`,
            `rmsprop`, `adagrad`, `adadelta`, `adafactor`, `lion`, `muon`, `soap`, `prodigy` or
            `schedule_free` (`penjing.train.optimizers`).
        lr: highest learning rate; None: the optimizer's, 0.05 for `sgd`, 0.001 for `adam` and most others.
        batch_size: examples in one step; None: the task's.
        weight_decay: on weights with two or more axes; normalization and biases have none.
        schedule: of the learning rate after the warm-up, for example `linear`, `cosine`, `step`,
            `one_cycle` (`penjing.train.schedule.lr_factor` lists them); None: the optimizer's, `linear`
            or, for `schedule_free`, `constant`.
        warmup: share of the steps over which the rate rises to its highest (`one_cycle`: 30% in any case).
        layer_decay: rate of a block as a share of that of the next, in (0, 1]; None: one rate for all.
            For fine-tuning transformers (Clark et al. 2020), where 0.65 to 0.95 is usual.
        clip_norm: largest norm of the gradient of all weights together; None: not clipped.
        averaging: of weights on the way, which are the ones kept in the end: `ema` exponentially (Polyak
            and Juditsky 1992), `swa` evenly over the last quarter (Izmailov et al. 2018), `latest` over
            the last few points (Kaddour 2022, "LAWA"). BatchNorm statistics are re-estimated after it.
        sam: radius of sharpness-aware minimization (Foret et al. 2021), 0.05 is usual; twice the time.
        label_smoothing: share of each label spread over all classes (Szegedy et al. 2016), in [0, 1).
        mixup: strength of blending pairs of examples and their labels (Zhang et al. 2018); 0: none.
        cutmix: strength of pasting a patch of another image (Yun et al. 2019); 0: none.
        flip: whether images are mirrored left to right at random.
        shift: largest shift of images at random, in pixels, up or down and left or right.
        start_size: height and width of images at the start, as a share; they grow to their own over the
            first three quarters (Howard 2018, "progressive resizing"). 1: no change.
        stochastic_depth: probability that the last residual block is left out for a batch; earlier ones
            less, in proportion to their place (Huang et al. 2016).
        recompute: whether blocks are computed again for their gradients instead of kept: less memory, a third
            more time (Chen et al. 2016).
        batchnorm: `train`, or `frozen`: statistics and scales stay as they are.
        ghost_batch: BatchNorm normalizes parts of a batch of so many examples (Hoffer et al. 2017).
        patience: evaluations on valid, one an epoch, without an improvement that a paired test sees, after
            which training ends (`plateau`: the rate falls to a tenth). Only `pj.fit` and `pj.tune` evaluate.
            None: training runs its length.
        accumulation_steps: micro-batches that a batch is computed in, whose gradients are accumulated; for
            want of memory.
        max_seconds: the schedule is shortened so that training fits; None: no limit.
        precision: `bfloat16` computes in it (weights, their gradients and the loss are float32 in any case):
            faster on an idle processor that has it, much slower where other processes compete for the
            cores. `auto` takes it where the processor has it and the network is of a kind that gains.
        layout: of images in memory: `channels_last` or `contiguous`; `auto` takes what gains for networks
            of the kind. `penjing.train.machine` measures both this and `precision`.
        compile: whether the model runs through `torch.compile`: `auto` tries it where at least ten minutes
            are left and keeps it where steps get faster, both measured.
        shard: whether several processes each hold a part of the weights, gradients and optimizer's state
            (FSDP) where there are several.

    Raises:
        Refused: a field is unknown or out of its range.

    >>> Strategy(epochs=10, optimizer="adamw", averaging="ema")
    Strategy(epochs=10.0, optimizer='adamw', averaging='ema')
    """

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise refusal(error, "Strategy", Strategy) from None

    def __str__(self) -> str:
        return repr(self)

    @property
    def peak_lr(self) -> float:
        """Return the highest learning rate: `lr`, or the optimizer's own.

        >>> Strategy(optimizer="adamw").peak_lr
        0.001
        """
        return OPTIMIZERS[self.optimizer].lr if self.lr is None else self.lr

    @property
    def lr_schedule(self) -> Schedule:
        """Return the schedule of the learning rate: `schedule`, or the optimizer's own.

        >>> Strategy().lr_schedule
        'linear'
        """
        return OPTIMIZERS[self.optimizer].schedule if self.schedule is None else self.schedule

    def with_batch_size(self, task: Task) -> Self:
        """Return the strategy with its batch size, or the task's where it has none."""
        return self.model_copy(update={"batch_size": self.batch_size or task.batch_size})
