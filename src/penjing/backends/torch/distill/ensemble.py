"""Several models that teach together, as an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penjing.backends.torch.tensors import select_output


class Ensemble(nn.Module):  # type: ignore[misc]
    """Runs several models on the same inputs.

    Args:
        models: each returns a tensor, all of one shape.
        weights: of each in what they teach, above 0.

    >>> Ensemble([nn.Linear(2, 3), nn.Linear(2, 3)], [1.0, 1.0])(torch.zeros(4, 2)).shape
    torch.Size([4, 2, 3])
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.weights = tuple(float(weight) for weight in weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the outputs of all models in float32, `[n, models, ...]`."""
        return torch.stack([select_output(model(*inputs)).float() for model in self.models], dim=1)
