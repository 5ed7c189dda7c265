"""Models of published shapes with random weights and random data: for latency only."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import penjing as pj

EXAMPLES = 192
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Of MobileNetV2: expansion, channels, repeats, stride."""
TABLES, ROWS, WIDTH, DENSE = 26, 10_000, 16, 13


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Module:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class Inverted(nn.Module):
    """Expand, depthwise, project (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        first = [_conv(inputs, inner, 1)] if expansion > 1 else []
        self.body = nn.Sequential(
            *first, _conv(inner, inner, 3, stride, inner), _conv(inner, outputs, 1, act=False)
        )
        self.same = inputs == outputs and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, outputs, ...] of [n, inputs, ...]."""
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2() -> nn.Module:
    """Return MobileNetV2 at width 1, 300 million multiply-adds at 224 by 224."""
    parts: list[nn.Module] = [_conv(3, 32, 3, 2)]
    width = 32
    for expansion, outputs, repeats, stride in BLOCKS:
        for i in range(repeats):
            parts.append(Inverted(width, outputs, expansion, stride if i == 0 else 1))
            width = outputs
    parts += [_conv(width, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*parts)


def _mlp(*widths: int) -> nn.Sequential:
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


class Dlrm(nn.Module):
    """Dot products of all pairs of 26 embeddings and the bottom network's output (Naumov et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = _mlp(DENSE, 512, 256, WIDTH)
        self.tables = nn.ModuleList(nn.Embedding(ROWS, WIDTH) for _ in range(TABLES))
        pairs = TABLES * (TABLES + 1) // 2
        self.register_buffer("pairs", torch.tril_indices(TABLES + 1, TABLES + 1, -1), persistent=False)
        self.top = _mlp(pairs + WIDTH, 512, 256, 2)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """Return [n, 2] of [n, 13] numbers and [n, 26] indices."""
        x = self.bottom(dense)
        stacked = torch.stack([x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))], dim=1)
        crossed = torch.bmm(stacked, stacked.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, crossed], dim=1))


def _task(*inputs: np.ndarray) -> pj.Task:
    y, third = np.arange(EXAMPLES) % 2, EXAMPLES // 3
    parts = [slice(0, third), slice(third, 2 * third), slice(2 * third, None)]
    train, valid, test = ((tuple(x[part] for x in inputs), y[part]) for part in parts)
    return pj.Task(train=train, valid=valid, test=test)


def _images() -> pj.Task:
    rng = np.random.default_rng(0)
    return _task(rng.standard_normal((EXAMPLES, 3, 224, 224)).astype(np.float32))


def _clicks() -> pj.Task:
    rng = np.random.default_rng(0)
    return _task(
        rng.standard_normal((EXAMPLES, DENSE)).astype(np.float32), rng.integers(0, ROWS, (EXAMPLES, TABLES))
    )


SHAPES: dict[str, tuple[Callable[[], nn.Module], Callable[[], pj.Task]]] = {
    "mobilenet_v2": (mobilenet_v2, _images),
    "dlrm": (Dlrm, _clicks),
}
"""By name: what makes the model, and what makes the task."""
