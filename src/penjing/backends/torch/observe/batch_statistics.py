"""BatchNorm layers: normalizing by the batch at hand, and statistics estimated anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from penjing.backends.torch.hooks import hooked
from penjing.backends.torch.tensors import to_inputs
from penjing.core.backend import Arrays


def find_batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers of a module by name, with and without running statistics."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def find_tracked_batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers of a module that keep running statistics, by name."""
    return {n: module for n, module in find_batchnorms(model).items() if module.running_mean is not None}


@contextlib.contextmanager
def normalizing_by_batch(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let these layers normalize by each batch's own statistics, all else in evaluation mode.

    What a network computes so is what it computes after its statistics are re-estimated on that batch (Wu &
    Johnson 2021, "Rethinking 'Batch' in BatchNorm"). Modes and running statistics are put back.
    """
    layers = tuple(layers)
    modes = [(module, module.training) for module in model.modules()]
    saved = [{key: b.clone() for key, b in m.named_buffers(recurse=False)} for m in layers]
    try:
        model.eval()
        for module in layers:
            module.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, buffers in zip(layers, saved, strict=True):
                for key, buffer in module.named_buffers(recurse=False):
                    buffer.copy_(buffers[key])


@dataclass
class Pooled:
    """Count, sum and sum of squares of every channel, in double precision."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, x: torch.Tensor) -> None:
        """Add a batch `[n, channels, ...]`."""
        axes = [a for a in range(x.ndim) if a != 1]
        x = x.detach().double()
        self.count += x.numel() // x.shape[1]
        self.total = self.total.to(x) + x.sum(axes)
        self.squares = self.squares.to(x) + x.square().sum(axes)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance, as torch's running statistics hold it."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return mean, variance * self.count / max(self.count - 1, 1)


@dataclass(frozen=True)
class Moved:
    """Values that a layer saw in each channel, and how far its mean went, in old standard deviations."""

    count: int
    mean_shift: float


def reestimate(model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Arrays]) -> dict[str, Moved]:
    """Set running means and variances to the exact values over pooled data.

    Every layer named normalizes with the statistics of the batch while the data passes, so that each sees its
    inputs as they will be (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", precise BN). Modes are put
    back.

    Args:
        layers: by name, as `find_tracked_batchnorms` gives them.
        batches: inputs of two examples or more.

    Returns:
        By name, what happened to it; nothing for a layer that the model does not call as a module.

    >>> import numpy as np
    >>> net = nn.BatchNorm1d(1)
    >>> reestimate(net, {"": net}, [(np.array([[1.0], [3.0]], np.float32),)])[""].count
    2
    >>> net.running_mean.item(), net.running_var.item()
    (2.0, 2.0)
    """
    sums = {name: Pooled() for name in layers}

    def add(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums[name].add(args[0])

    with hooked(layers, add), normalizing_by_batch(model, layers.values()), torch.no_grad():
        for inputs in batches:
            model(*to_inputs(model, inputs))
    return {name: _set(layers[name], found) for name, found in sums.items() if found.count}


def _set(module: nn.Module, found: Pooled) -> Moved:
    mean, variance = found.mean_and_variance()
    shift = (mean - module.running_mean).abs() / (module.running_var + module.eps).sqrt()
    moved = Moved(found.count, float(shift.mean()))
    with torch.no_grad():
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)
    return moved
