"""What a caller may do while a model trains: four hooks of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penjing.core.progress import Say, silent

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TrainingProgress:
    """Where training stands when the `evaluate` hook is called.

    Attributes:
        epoch: epochs behind; may be a fraction.
        step: optimizer steps taken, of `total_steps`.
        total_steps: steps of the whole schedule.
        loss: mean training loss of the last epoch, or of the part of it; NaN where no step counted.
        seconds: of training, without the time spent in the hook.
        evaluated_weights: a context in which the model has the weights that it is evaluated by: averaged
            ones where the strategy averages.
    """

    epoch: float
    step: int
    total_steps: int
    loss: float
    seconds: float
    evaluated_weights: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Decision:
    """What the `evaluate` hook asks of the loop.

    Attributes:
        stop: whether training ends here.
        lr_factor: factor on the learning rate from here on.
        reason: of it, in words; it becomes an event of the result.
        keep_evaluated: whether training that ends here leaves the very weights and BatchNorm statistics that
            were evaluated.

    >>> Decision(lr_factor=0.1, reason="plateau").stop
    False
    """

    stop: bool = False
    lr_factor: float = 1.0
    reason: str = ""
    keep_evaluated: bool = False


CONTINUE = Decision()
"""Go on as before."""


def is_watched(model: nn.Module) -> bool:
    """Tell whether a torch module's layers have hooks, which compiled or sharded calls may not reach."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def _ignore(progress: float) -> None:
    return None


def _continue(progress: TrainingProgress) -> Decision:
    return CONTINUE


@dataclass(frozen=True)
class Hooks:
    """Functions that the training loop calls; by default they do nothing.

    The loop, with every hook in its place (`penjing.train.loop.fit`; the body of a step is
    `penjing.train.stepper.Stepper.step`)::

        # model.train(); frozen layers and their BatchNorm statistics stay
        # a saved state is restored
        for epoch in itertools.count():
            for batch in batches(train, seed, epoch):
                batch = augment(batch)
                for micro_batch in batch:                   # accumulation_steps of them
                    loss = objective(model(micro_batch))
                    loss.backward()
                hooks.after_backward(progress)              # progress: share of the steps behind
                # masks are enforced, gradients clipped; loss not finite: the last snapshot is restored
                # SAM: gradients are taken once more, at perturbed weights, and after_backward called again
                optimizer.step()
                # masks are enforced, averages of the weights updated
                hooks.after_step(progress)
                if step % (evaluate_every epochs) == 0 or last step:
                    decision = hooks.evaluate(TrainingProgress)
                    # learning rate times decision.lr_factor; the loop ends where it says stop
                # the state is saved, every 20 s
            hooks.log("epoch 1 of 3: loss 0.4")
        # averaged weights are copied to the model, BatchNorm statistics re-estimated for them
        # modes and frozen flags are put back

    Attributes:
        log: called with a line of progress once an epoch.
        after_backward: called when the gradients of a step are there, before they are clipped.
        after_step: called after the optimizer's step.
        evaluate: called after every `evaluate_every` epochs and at the end; its decision changes the
            training.
        evaluate_every: epochs between two calls of `evaluate`, above 0.

    `after_backward` and `after_step` get the share of the training that lies behind, in [0, 1).

    >>> from penjing.core.progress import Line
    >>> Hooks(log=print).log(Line.training("epoch 1 of 3: loss 0.4"))
    epoch 1 of 3: loss 0.4
    """

    log: Say = silent
    after_backward: Callable[[float], None] = _ignore
    after_step: Callable[[float], None] = _ignore
    evaluate: Callable[[TrainingProgress], Decision] = _continue
    evaluate_every: float = 1.0


NO_HOOKS = Hooks()
