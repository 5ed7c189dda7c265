"""What a registered architecture is, and the pieces that hand-written ones share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 10
"""Outputs of every classifier here."""

VOCABULARY = 60
"""Words that every language model here knows."""


@dataclass(frozen=True)
class Architecture:
    """A model in a small configuration, with random weights.

    Attributes:
        name: unique; `hf-` marks a model of the transformers library.
        family: `vision`, `dense prediction`, `vision transformer`, `sequence`, `language`, `recommender`.
        build: makes the model in evaluation mode; the same weights at every call.
        example: makes two examples of the inputs.
        output: the output that counts where the model returns several, as in `Task.output`; None for all.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple[np.ndarray, ...]]
    output: int | str | Callable[..., Any] | None = None


def architectures(
    family: str, models: dict[str, Callable[[], nn.Module]], example: Callable[[], tuple[np.ndarray, ...]]
) -> dict[str, Architecture]:
    """Register several models that take the same inputs."""
    return {name: Architecture(name, family, seeded(build), example) for name, build in models.items()}


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make the weights repeat, and none trivial: fresh norms, biases and tables hold zeros and ones."""

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build().eval()
            _stir(model)
        return model

    return made


def _stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)


def images(size: int = 32, channels: int = 3) -> Callable[[], tuple[np.ndarray, ...]]:
    """Return a maker of two square images `[2, channels, size, size]`, float32."""
    return lambda: (_normal(2, channels, size, size),)


def waves(channels: int, length: int) -> Callable[[], tuple[np.ndarray, ...]]:
    """Return a maker of two series `[2, channels, length]`, float32."""
    return lambda: (_normal(2, channels, length),)


def tokens(length: int = 12, vocabulary: int = VOCABULARY) -> Callable[[], tuple[np.ndarray, ...]]:
    """Return a maker of two rows of token numbers `[2, length]`, int64, without the special ones below 3."""
    return lambda: (np.random.default_rng(0).integers(3, vocabulary, (2, length)),)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Return convolution, BatchNorm and activation, padded to keep the size at stride 1."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


def head(width: int, outputs: int = CLASSES) -> nn.Sequential:
    """Return global average pooling and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all (Hu et al. 2018)."""

    def __init__(self, width: int, inner: int, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1), gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scaled input, same shape."""
        mean = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.expand(F.relu(self.reduce(mean))))
