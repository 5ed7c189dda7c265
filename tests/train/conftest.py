from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from penjing.core.task import Split


def small_net(width: int = 8, seed: int = 0) -> nn.Sequential:
    """A convolutional network for 8x8 images of ten digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 16, 3, 1, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, 10),
        )


@pytest.fixture
def net():
    return small_net


@pytest.fixture(scope="session")
def digits():
    """Scikit-learn's handwritten digits as images `[n, 1, 8, 8]` in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


@pytest.fixture
def split(digits):
    x, y = digits
    return Split((x[:600],), y[:600], "train")
