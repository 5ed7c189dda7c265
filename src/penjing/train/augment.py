"""What changes a batch before the model sees it: mirrored, shifted, resized and mixed images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penjing.core.errors import Refused
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from penjing.train.objective import Tensors

GROWN = 0.75
"""Share of the way at which growing images have reached their own size."""

SMALLEST = 8
"""Pixels in the smallest side that images shrink to."""


@dataclass(frozen=True)
class MixedBatch:
    """A batch whose examples may be mixed of two (mixup, cutmix).

    Attributes:
        inputs: what the model sees, tensors `[n, ...]`.
        targets: of each example, `[n, ...]`.
        other_targets: of what was mixed into it; None without mixing.
        weight: of the first targets' loss, in [0, 1]: the papers' lambda.
    """

    inputs: Tensors
    targets: Tensor
    other_targets: Tensor | None = None
    weight: float = 1.0


def changes_inputs(strategy: Strategy) -> bool:
    """Tell whether a model sees other inputs than those of the data.

    >>> changes_inputs(Strategy(flip=True)), changes_inputs(Strategy())
    (True, False)
    """
    changes = (strategy.mixup, strategy.cutmix, strategy.flip, strategy.shift, strategy.start_size < 1)
    return any(changes)


def augment(strategy: Strategy, inputs: Tensors, targets: Tensor, progress: float) -> MixedBatch:
    """Return a batch as the strategy changes it; random choices come from torch's generator.

    Mixup blends the whole example with weights drawn from a Beta distribution (Zhang et al. 2018, arXiv
    1710.09412), cutmix pastes a rectangle of another (Yun et al. 2019, arXiv 1905.04899); with both, one of
    the two is drawn for each batch.

    Args:
        strategy: says what is done.
        inputs: tensors `[n, ...]`; the first one is changed.
        targets: `[n, ...]`.
        progress: share of the training behind, in [0, 1).

    Raises:
        Refused: images are needed and the first input is none, or numbers are needed and it holds whole ones.

    >>> import torch
    >>> batch = augment(Strategy(mixup=0.2), (torch.zeros(2, 3),), torch.tensor([0, 1]), progress=0.0)
    >>> batch.inputs[0].shape, sorted(batch.other_targets.tolist()), 0 <= batch.weight <= 1
    (torch.Size([2, 3]), [0, 1], True)
    """
    if not changes_inputs(strategy):
        return MixedBatch(inputs, targets)
    x = inputs[0]
    images = strategy.flip or strategy.shift or strategy.cutmix or strategy.start_size < 1
    if images and (x.ndim != 4 or not x.is_floating_point()):
        raise Refused(
            "flip, shift, cutmix and start_size need images [n, channels, height, width]",
            value=f"{x.dtype} {tuple(x.shape)}",
            place="the first input",
            fix="leave them out; augment text and tables in the data",
        )
    if strategy.mixup and not x.is_floating_point():
        raise Refused(
            "mixup needs floating-point inputs",
            value=str(x.dtype),
            place="the first input",
            fix="leave mixup out",
        )
    if strategy.flip:
        x = _flip(x)
    if strategy.shift:
        x = _shift(x, strategy.shift)
    if strategy.start_size < 1:
        x = _resize(x, strategy.start_size, progress)
    if not (strategy.mixup or strategy.cutmix):
        return MixedBatch((x, *inputs[1:]), targets)
    return _mix(strategy, x, inputs[1:], targets)


def _flip(x: Tensor) -> Tensor:
    import torch

    chosen = torch.rand(len(x), device=x.device) < 0.5
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)


def _shift(x: Tensor, most: int) -> Tensor:
    """Move each image by its own whole numbers of pixels; what comes in is a mirror of what is there."""
    import torch

    height, width = x.shape[-2:]
    most = min(most, height - 1, width - 1)
    wide = torch.nn.functional.pad(x, (most,) * 4, mode="reflect")
    down, right = torch.randint(0, 2 * most + 1, (2, len(x)), device=x.device)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    moved = wide.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _resize(x: Tensor, start: float, progress: float) -> Tensor:
    import torch

    share = min(1.0, start + (1 - start) * progress / GROWN)
    sizes = [max(min(SMALLEST, side), 4 * round(share * side / 4)) for side in x.shape[-2:]]
    if share == 1 or tuple(sizes) == tuple(x.shape[-2:]):
        return x
    return torch.nn.functional.interpolate(x, size=sizes, mode="bilinear", antialias=True)


def _mix(strategy: Strategy, x: Tensor, rest: Tensors, targets: Tensor) -> MixedBatch:
    import torch

    cut = bool(strategy.cutmix) and (not strategy.mixup or bool(torch.rand(()) < 0.5))
    strength = strategy.cutmix if cut else strategy.mixup
    share = float(torch.distributions.Beta(strength, strength).sample())
    order = torch.randperm(len(x), device=x.device)
    if cut:
        x, share = _paste(x, order, share)
    else:
        x = share * x + (1 - share) * x[order]
        if any(not tensor.is_floating_point() for tensor in rest):
            raise Refused(
                "mixup needs floating-point inputs",
                value="another input of whole numbers",
                place="the inputs",
                fix="leave mixup out",
            )
        rest = tuple(share * tensor + (1 - share) * tensor[order] for tensor in rest)
    return MixedBatch((x, *rest), targets, targets[order], share)


def _paste(x: Tensor, order: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a rectangle, of about `1 - share` of the area, and return the share that is really left."""
    import torch

    height, width = x.shape[-2:]
    side = math.sqrt(1 - share)
    tall, wide = int(height * side), int(width * side)
    middle = [int(torch.randint(0, size, ())) for size in (height, width)]
    top, left = (max(m - size // 2, 0) for m, size in zip(middle, (tall, wide), strict=True))
    bottom = min(middle[0] + (tall + 1) // 2, height)
    right = min(middle[1] + (wide + 1) // 2, width)
    x = x.clone()
    x[..., top:bottom, left:right] = x[order][..., top:bottom, left:right]
    return x, 1 - (bottom - top) * (right - left) / (height * width)
