"""A task file for tests: a small network on handwritten digits, trained in a second."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

import penjing as pj

WEIGHTS = Path(__file__).with_name("tiny.safetensors")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.conv2(x).relu().mean((2, 3)))


def splits():
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return [(images[part], digits.target[part]) for part in np.split(order, [800, 1100])]


def task():
    train, valid, test = splits()
    return pj.Task(train=train, valid=valid, test=test, batch_size=64)


def model():
    torch.manual_seed(0)
    net = Net()
    if WEIGHTS.exists():
        net.load_state_dict(load_file(WEIGHTS))
        return net
    images, labels = (torch.from_numpy(a) for a in splits()[0])
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    for _ in range(12):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
    save_file(net.state_dict(), WEIGHTS)
    return net
