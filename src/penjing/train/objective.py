"""What training minimises: losses on the tensors of one batch, and how batches become tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from penjing.core.backend import Arrays
from penjing.core.errors import Refused
from penjing.core.task import Split, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

Tensors = tuple["Tensor", ...]
Objective = Callable[[Any, Tensors, "Tensor"], "Tensor"]
"""Mean loss of a batch from (what the model returned, its inputs, the targets)."""


def pick(outputs: Any, output: int | str | Callable[..., Any] | None) -> Tensor:
    """Return the tensor that counts of what a model returned, in float32.

    `output` is the task's: a key, an index, a function, or None where the model returns one tensor.

    Raises:
        Refused: several outputs and no choice, or a choice that the outputs do not have.

    >>> import torch
    >>> pick({"logits": torch.ones(2), "states": torch.zeros(3)}, "logits")
    tensor([1., 1.])
    """
    if callable(output):
        chosen = output(outputs)
    elif output is None:
        chosen = _only_output(outputs)
    else:
        try:
            chosen = _at(outputs, output)
        except (KeyError, IndexError, TypeError) as error:
            raise Refused(
                "must be an output of the model",
                value=repr(output),
                place="task.output",
                fix="name a key or an index that the model returns",
            ) from error
    return chosen.float()


def _at(outputs: Any, output: int | str) -> Tensor:
    if isinstance(output, str) and not isinstance(outputs, Mapping) and hasattr(outputs, output):
        found: Tensor = getattr(outputs, output)
        return found
    chosen: Tensor = outputs[output]
    return chosen


def _only_output(outputs: Any) -> Tensor:
    values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if not isinstance(values, list | tuple):
        values = [getattr(values, "logits", values)]
    if len(values) == 1:
        only: Tensor = values[0]
        return only
    raise Refused(
        "must say which output counts",
        value=f"{len(values)} outputs of the model",
        place="task.output",
        fix="give Task(output=...) a key, an index or a function",
    )


def make_objective(task: Task, smoothing: float = 0.0) -> Objective:
    """Return the task's own loss as an objective.

    Args:
        task: names or gives the loss (`penjing.backends.torch.losses.resolve_loss`).
        smoothing: share of each label that is spread over all classes (Szegedy et al. 2016).

    Raises:
        Refused: a loss of an unknown name, or smoothing of another than `cross_entropy`; when called, outputs
            and targets that do not belong together, with the shapes of both.

    >>> import torch
    >>> objective = make_objective(Task(train=None))
    >>> objective(torch.zeros(1, 2), (), torch.tensor([1])).item()
    0.6931471824645996
    """
    from penjing.backends.torch.losses import resolve_loss

    if smoothing and task.loss != "cross_entropy":
        raise Refused(
            "label_smoothing needs the loss 'cross_entropy'",
            value=getattr(task.loss, "__name__", repr(task.loss)),
            place="task.loss",
            fix="leave it out, or smooth in the loss",
        )
    loss = resolve_loss(task.loss, smoothing)

    def objective(outputs: Any, inputs: Tensors, targets: Tensor) -> Tensor:
        return loss(pick(outputs, task.output), targets)

    return objective


def to_tensors(arrays: Arrays, like: Tensor | None = None) -> Tensors:
    """Return arrays as tensors on the device of `like`; floating ones in its dtype.

    >>> import numpy as np
    >>> to_tensors((np.array([1, 2]),))
    (tensor([1, 2]),)
    """
    import numpy as np
    import torch

    tensors = [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]
    if like is None:
        return tuple(tensors)
    dtype = like.dtype
    return tuple(t.to(like.device, dtype if t.is_floating_point() else None) for t in tensors)


def evaluate_loss(
    model: nn.Module, split: Split, objective: Objective, batch_size: int, seed: int = 0
) -> float:
    """Return the mean loss in evaluation mode over at most four batches, the same for the same seed.

    Infinite or NaN losses are returned as they are; an objective that needs no labels may ignore them.
    """
    import torch

    like = next(iter(model.parameters()), None)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for inputs, targets in split.batches(batch_size, seed):
                x, y = to_tensors(inputs, like), to_tensors((targets,), like)[0]
                total += float(objective(model(*x), x, y)) * len(targets)
                count += len(targets)
                if count >= 4 * batch_size:
                    break
    finally:
        for module, mode in modes:
            module.training = mode
    return total / count if count else math.nan
