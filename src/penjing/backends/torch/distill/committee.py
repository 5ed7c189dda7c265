"""Several models that teach together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from penjing.backends.torch.tensors import select_output


class Committee(nn.Module):  # type: ignore[misc]
    """Runs several models on the same inputs.

    Args:
        models: each returns a tensor, all of one shape.
        weights: of each in what they teach, above 0.
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.weights = tuple(float(weight) for weight in weights)

    def forward(self, *inputs: Any) -> Any:
        """Return the outputs of all models in float32, `[n, models, ...]`."""
        return torch.stack([select_output(model(*inputs)).float() for model in self.models], dim=1)
