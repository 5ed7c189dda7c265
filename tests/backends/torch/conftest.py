"""Networks and helpers for the tests of the torch backend."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

torch.set_num_threads(1)


class Shortcut(nn.Module):
    """ResNet with the option-A shortcut: strided slice and zero channels on both sides."""

    class Block(nn.Module):
        def __init__(self, wide, out, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(out)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(out)
            self.pad = (out - wide) // 2

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            if self.pad:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
            y += x
            return F.relu_(y)

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one = Shortcut.Block(8, 8, 1)
        self.two = Shortcut.Block(8, 16, 2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 4)

    def forward(self, image):
        y = self.two(self.one(self.stem(image)))
        return self.head(self.drop(F.avg_pool2d(y, y.shape[-1]).view(y.size(0), -1)))


def settle(model, seed=0):
    """Give every tensor random values, BatchNorm statistics included, so that no channel is like another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(noise * 0.3 + (0.1 if parameter.ndim == 1 else 0))
    return model


@pytest.fixture
def shortcut():
    return settle(Shortcut())


@pytest.fixture
def images():
    return (np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("float32"),)


@pytest.fixture(scope="session")
def settled():
    return settle


@pytest.fixture(scope="session")
def halve():
    """A function that keeps some units of every group, at random but fairly; returns model, kept, groups."""
    from oracles.selection import select
    from penjing.backends.torch import BACKEND

    def cut(model, inputs, ratio=0.5, round_to=1, seed=0):
        groups = BACKEND.groups(model, inputs)
        generator = np.random.default_rng(seed)
        kept = {g.name: select(generator.random(g.size), ratio, g.blocks, round_to) for g in groups.groups}
        return BACKEND.keep(model, groups, kept), kept, groups

    return cut
