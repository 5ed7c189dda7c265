"""A task file: a small residual network on scikit-learn's handwritten digits.

The weights are trained once, beside this file. Try it by hand:

    penjing optimize task.py --max-drop 4% --latency 80% --size 60% --time 1min
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

import penjing as pj

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return an array of the shape of `x`, [n, width, 8, 8]."""
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + x).relu()


class Net(nn.Module):
    """A residual network for 8 by 8 images, about 75,000 parameters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(*[Block(width) for _ in range(4)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 10] of images [n, 1, 8, 8]."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _splits() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.split(order, [700, 1000])
    return tuple((images[part], digits.target[part]) for part in parts)


def task() -> pj.Task:
    """Return 700 images to train on, 300 to search with and 797 to certify on."""
    train, valid, test = _splits()
    return pj.Task(train=train, valid=valid, test=test, class_names=tuple("0123456789"))


def model() -> nn.Module:
    """Return the trained network."""
    net = Net()
    if WEIGHTS.exists():
        net.load_state_dict(load_file(WEIGHTS))
        return net
    torch.manual_seed(0)
    net = Net()
    images, labels = (torch.from_numpy(part) for part in _splits()[0])
    epochs, size = 8, 64
    steps = epochs * -(-len(images) // size)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    save_file(net.state_dict(), WEIGHTS)
    return net
