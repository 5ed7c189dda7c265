"""The losses of a task on torch tensors; pairs of outputs and targets that mean nothing are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from penjing.core.errors import Exit, Refused, nearest
from penjing.core.kind import IGNORED_TARGET, LOSS_NAMES, align_shapes

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets to the mean over the batch."""

SHIFTS = (1, 2, 3)
"""Places by which targets are moved to see whether a loss knows which output each of them is for."""


def resolve_loss(loss: str | LossFunction, smoothing: float = 0.0) -> LossFunction:
    """Return a task's loss as a function of (outputs, targets): the mean over the batch.

    `cross_entropy` takes logits `[n, classes, ...]` and class indices `[n, ...]` or probabilities of the
    outputs' shape; `binary_cross_entropy` (`bce`) logits and targets in [0, 1] of one shape; `mse`, `mae` and
    `huber` (quadratic up to a distance of 1) outputs and targets of one shape. One column may be missing:
    `[n, 1]` and `[n]` are the same. A function of the user's is called as it is, after it was seen once that
    it takes both and pairs each output with its own target.

    Args:
        loss: a name, or a function.
        smoothing: share of each label that `cross_entropy` spreads over all classes, in [0, 1).

    Raises:
        Refused: an unknown name; when called, outputs and targets that do not belong together, with the
            shapes of both.

    >>> resolve_loss("mse")(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]))
    tensor(2.)
    >>> resolve_loss("cross_entropy")(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).item()
    0.6931471824645996
    """
    if callable(loss):
        return OwnLoss(loss)
    if loss == "cross_entropy":
        return partial(_cross_entropy, smoothing)
    if loss in _ELEMENTWISE:
        return partial(_elementwise, loss)
    raise Refused(
        "must be a known loss or a function",
        value=repr(loss),
        place="task.loss",
        fix=f"{nearest(loss, LOSS_NAMES)}; or pass a function of (outputs, targets) that returns a mean",
        code=Exit.USAGE,
    )


def _cross_entropy(smoothing: float, outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise _refuse_pair(
            "loss 'cross_entropy' needs at least two logits for each example",
            outputs,
            targets,
            "take loss='bce' for one logit, loss='mse' for a number",
        )
    if targets.is_floating_point() and targets.shape == outputs.shape:
        return functional.cross_entropy(outputs, targets, label_smoothing=smoothing)
    if targets.is_floating_point() or targets.shape != (outputs.shape[0], *outputs.shape[2:]):
        raise _refuse_pair(
            "loss 'cross_entropy' needs class indices, or probabilities of the outputs' shape",
            outputs,
            targets,
            "take loss='bce' for several labels, loss='mse' for numbers",
        )
    targets = targets.long()
    classes = outputs.shape[1]
    wrong = ((targets < 0) | (targets >= classes)) & (targets != IGNORED_TARGET)
    if bool(wrong.any()):
        raise Refused(
            f"class indices must lie in [0, {classes - 1}]",
            value=int(targets[wrong][0]),
            place="task.train",
            fix="number the classes from 0",
        )
    return functional.cross_entropy(outputs, targets, label_smoothing=smoothing)


def _elementwise(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    if not align_shapes(tuple(outputs.shape), tuple(targets.shape)):
        classes = not targets.is_floating_point() and targets.ndim == outputs.ndim - 1
        raise _refuse_pair(
            f"loss {name!r} needs targets of the outputs' shape",
            outputs,
            targets,
            "take loss='cross_entropy' for class indices" if classes else "give one target for each output",
        )
    targets = targets.reshape(outputs.shape).to(outputs.dtype)
    if _ELEMENTWISE[name] is functional.binary_cross_entropy_with_logits:
        wrong = (targets < 0) | (targets > 1)
        if bool(wrong.any()):
            raise Refused(
                f"loss {name!r} needs targets in [0, 1]",
                value=f"{float(targets[wrong][0]):g}",
                place="task.train",
                fix="give 1 where a label is there and 0 where it is not",
            )
    return _ELEMENTWISE[name](outputs, targets)


_ELEMENTWISE: dict[str, LossFunction] = {
    "binary_cross_entropy": functional.binary_cross_entropy_with_logits,
    "bce": functional.binary_cross_entropy_with_logits,
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
}


class OwnLoss:
    """A loss of the user's, looked at once before it is believed.

    Where outputs and targets have shapes that torch would broadcast (`[n, 1]` with `[n]`), the loss is called
    on outputs drawn at random: one that gives the same for targets in another order pairs every output with
    every target, and training by it means nothing. One that never reads its targets may do so.

    >>> loss = OwnLoss(lambda outputs, targets: (outputs - targets).abs().mean())
    >>> loss(torch.zeros(3, 1), torch.tensor([1.0, 2.0, 3.0]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    penjing.core.errors.Refused: task.loss: a loss must pair each output with its own target, ...
    """

    def __init__(self, function: LossFunction) -> None:
        self._function = function
        self._believed = False

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch.

        Raises:
            Refused: the first time, a function that cannot take the two, or that does not return one number.
        """
        if self._believed:
            return self._function(outputs, targets)
        if _broadcasts(outputs, targets) and not self._pairs(outputs, targets):
            raise _refuse_pair(
                "a loss must pair each output with its own target, not with every one",
                outputs,
                targets,
                "give both one shape: squeeze the outputs in the loss, or give targets [n, 1]",
            )
        try:
            value = self._function(outputs, targets)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error).lower():
                raise
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise _refuse_pair(
                f"the loss must take the model's outputs and the targets ({line})",
                outputs,
                targets,
                "try the loss on one batch by hand",
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Refused(
                "must return one number, as a tensor",
                value=shape,
                place="task.loss",
                fix="return the mean over the batch",
            )
        self._believed = len(outputs) > 1
        return value

    def _pairs(self, outputs: Tensor, targets: Tensor) -> bool:
        """Tell whether the order of the targets counts, or they do not count at all."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            drawn = torch.rand(outputs.shape).mul(0.9).add(0.05).to(outputs)
            try:
                own = float(self._function(drawn, targets))
                moved = [float(self._function(drawn, targets.roll(shift, 0))) for shift in SHIFTS]
                one = float(self._function(drawn, targets[:1].expand_as(targets)))
            except (ValueError, TypeError, IndexError, RuntimeError):
                return True  # the call proper will say what is wrong
        close = 1e-5 * max(abs(own), 1e-12)
        return any(abs(other - own) > close for other in moved) or abs(one - own) <= close


def _broadcasts(outputs: Tensor, targets: Tensor) -> bool:
    """Tell whether torch would make more of outputs and targets than there are of either."""
    if outputs.shape == targets.shape or len(outputs) < 2 or bool((targets == targets[:1]).all()):
        return False
    try:
        made = torch.broadcast_shapes(outputs.shape, targets.shape)
    except RuntimeError:
        return False
    return bool(made.numel() > max(outputs.numel(), targets.numel()))


def _refuse_pair(rule: str, outputs: Tensor, targets: Tensor, fix: str) -> Refused:
    kind = str(targets.dtype).removeprefix("torch.")
    return Refused(
        rule,
        value=f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)} of {kind}",
        place="task.loss",
        fix=fix,
    )
