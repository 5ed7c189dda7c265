"""A loss that needs no labels: the Fisher information of what the model itself predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OwnLabels:
    """A loss whose labels are drawn from the model's own predictions; the targets are ignored.

    The mean square of its gradient is the true Fisher information (for `cross_entropy`), or, along random
    directions of the output, that of a Gaussian model (for any other loss). It does not vanish where the
    model fits its training data.
    """

    def __init__(self, loss: str | Callable[..., Any], seed: int) -> None:
        self._classes = loss == "cross_entropy"
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the batch.

        Args:
            outputs: logits `[n, classes, ...]` for `cross_entropy`; any `[n, ...]` otherwise.
            targets: not used.
        """
        if self._generator is None:
            self._generator = torch.Generator(outputs.device).manual_seed(self._seed)
        if self._classes:
            last = outputs.detach().float().movedim(1, -1)
            shares = last.softmax(-1).reshape(-1, last.shape[-1])
            drawn = torch.multinomial(shares, 1, generator=self._generator).reshape(last.shape[:-1])
            return torch.nn.functional.cross_entropy(outputs, drawn)
        noise = torch.randn(outputs.shape, generator=self._generator, device=outputs.device)
        return (outputs * noise.to(outputs.dtype)).flatten(1).sum(1).mean()
